"""The eager operators on a CPU: `kernels.reference`'s, but for dropout and attention, which PyTorch is slow at there.

Dropout's random bits are four to a number: PyTorch draws a number for each. In half precision the backward of PyTorch's
attention takes ten times as long as in float32, and with dropout it is computed step by step in float32; here attention
is products of the given dtype, which CPUs with bfloat16 products do at four times the speed of float32.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import checks, reference
from kernels.reference import causal_attention, decode_attention, gelu_ffn, layer_norm, linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "causal_attention",
    "causal_attention_qkvpacked",
    "decode_attention",
    "dropout",
    "gelu_ffn",
    "layer_norm",
    "linear_cross_entropy",
]

# beyond it the probabilities, which are kept for the backward, would be several times the size of all else
_LONGEST = 512
_TILE = 2**20  # scores at a time: they stay in the cache


def dropout(x: Tensor, dropout_p: float) -> Tensor:
    """Set a share of x [...] to zero, and let the rest grow by 1 / (1 - dropout_p). `F.dropout`, several times as fast.

    The share is a multiple of 2**-16.
    """
    if torch.compiler.is_compiling():
        return F.dropout(x, dropout_p)
    kept, growth = _kept(x.shape, dropout_p)
    return x * kept * growth


def _kept(shape: torch.Size | tuple[int, ...], dropout_p: float) -> tuple[Tensor, float]:
    """Which elements stay, 1 with probability 1 - dropout_p and 0 else, and what they grow by."""
    count = torch.Size(shape).numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = round(dropout_p * 2**16)
    kept = (bits[:count] >= dropped - 2**15).view(torch.uint8)  # products with bool take four times as long
    return kept.view(shape), 1.0 / (1.0 - dropped / 2**16)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`kernels.reference.add_layer_norm`."""
    if dropout_p > 0.0 and seed is None and x.device.type == "cpu":
        checks.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)
        x, dropout_p = dropout(x, dropout_p), 0.0
    return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)


def causal_attention_qkvpacked(
    qkv: Tensor, scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """`kernels.reference.causal_attention_qkvpacked`. Half precision and dropout take one derivative."""
    slow = qkv.device.type == "cpu" and (qkv.dtype.itemsize < 4 or dropout_p > 0.0)
    if not slow or seed is not None or qkv.numel() == 0 or torch.compiler.is_compiling():
        return reference.causal_attention_qkvpacked(qkv, scale, dropout_p, seed)
    checks.causal_attention_qkvpacked(qkv, scale, dropout_p, seed)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        if dropout_p == 0.0 and qkv.shape[1] > _LONGEST:
            return reference.causal_attention_qkvpacked(qkv.float(), scale).to(qkv.dtype)
        return _Attention.apply(qkv, scale, dropout_p)


class _Attention(torch.autograd.Function):
    """Causal attention of qkv [B, T, 3, H, D] -> [B, T, H, D], its probabilities kept for the backward."""

    @staticmethod
    def forward(ctx, qkv: Tensor, scale: float, dropout_p: float) -> Tensor:
        B, T, _, H, D = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, B * H, T, D)
        future = _future(T, qkv.dtype)
        p = q.new_empty(B * H, T, T)
        kept, growth = _kept(p.shape, dropout_p) if dropout_p > 0.0 else (None, 1.0)
        o = torch.empty_like(q)
        for heads in _tiles(B * H, T):
            torch.softmax(torch.baddbmm(future, q[heads], k[heads].mT, alpha=scale), -1, out=p[heads])
            torch.bmm(p[heads] if kept is None else p[heads] * kept[heads], v[heads], out=o[heads])
        ctx.save_for_backward(q, k, v, p, kept)
        ctx.scale, ctx.growth, ctx.batch = scale, growth, B
        return (o if kept is None else o.mul_(growth)).view(B, H, T, D).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Tensor, None, None]:
        q, k, v, p, kept = ctx.saved_tensors
        B, (BH, T, D) = ctx.batch, q.shape
        do = do.transpose(1, 2).reshape(BH, T, D)
        if kept is not None:
            do = do * ctx.growth
        gradients = q.new_empty(3, BH, T, D)
        dq, dk, dv = gradients
        for heads in _tiles(BH, T):
            dp = torch.bmm(do[heads], v[heads].mT)
            if kept is None:
                torch.bmm(p[heads].mT, do[heads], out=dv[heads])
            else:
                dp.mul_(kept[heads])
                torch.bmm((p[heads] * kept[heads]).mT, do[heads], out=dv[heads])
            ds = torch._softmax_backward_data(dp, p[heads], -1, p.dtype).mul_(ctx.scale)
            torch.bmm(ds, k[heads], out=dq[heads])
            torch.bmm(ds.mT, q[heads], out=dk[heads])
        return gradients.view(3, B, BH // B, T, D).permute(1, 3, 0, 2, 4).contiguous(), None, None


@functools.lru_cache(maxsize=4)
def _future(length: int, dtype: torch.dtype) -> Tensor:
    """[T, T], minus infinity where a key comes after the query."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def _tiles(heads: int, length: int) -> list[slice]:
    """Which heads [B * H] are computed together."""
    step = max(1, _TILE // length**2)
    return [slice(first, first + step) for first in range(0, heads, step)]
