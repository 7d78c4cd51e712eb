"""The eager operators on a CPU: `kernels.reference`'s, but for those that PyTorch can be made faster at there.

Dropout's random bits are four to a number: PyTorch draws a number for each. In half precision the backward of PyTorch's
attention takes ten times as long as in float32, and with dropout it is computed step by step in float32; here attention
is products of the given dtype, which CPUs with bfloat16 products do at four times the speed of float32. int8 weights
are multiplied as such, or made floating numbers a part at a time, which stays in the cache.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import checks, pytorch_internals, reference, runtime
from kernels.reference import causal_attention, gelu_ffn, layer_norm, linear_cross_entropy

__all__ = [
    "add_layer_norm",
    "causal_attention",
    "causal_attention_qkvpacked",
    "decode_attention",
    "dropout",
    "gelu_ffn",
    "int8_linear",
    "layer_norm",
    "linear_cross_entropy",
]

# beyond it the probabilities, which are kept for the backward, would be several times the size of all else
_LONGEST = 512
_TILE = 2**20  # scores at a time: they stay in the cache
# of int8 weights made floating numbers at a time: they stay in the cache
_WEIGHT_BYTES = 2**21
# beyond, PyTorch's product with int8 weights, whose time grows with each row, is slower than one with floating ones
_FEW_ROWS = 16


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
            ds = pytorch_internals.softmax_backward(dp, p[heads], -1, p.dtype).mul_(ctx.scale)
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


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """`kernels.reference.decode_attention`; what lies beyond the longest sequence is not read."""
    checks.decode_attention(q, k_cache, v_cache, lengths, scale)
    if q.device.type != "cpu" or lengths.numel() == 0 or torch.compiler.is_compiling():
        return reference.decode_attention(q, k_cache, v_cache, lengths, scale)
    shortest, longest = (int(bound) for bound in lengths.aminmax())
    k_cache, v_cache = k_cache[:, :, :longest], v_cache[:, :, :longest]
    if shortest == longest and q.shape[2] <= k_cache.shape[2]:
        mask = reference.causal_mask(q.shape[2], k_cache.shape[2], q.device) if q.shape[2] > 1 else None
        return F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, scale=scale)
    return reference.decode_attention(q, k_cache, v_cache, lengths, scale)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`kernels.reference.int8_linear`, without all weights in float32 at once.

    Up to 16 rows in bfloat16 go to PyTorch's own product with int8 weights, which reads a byte for each and takes the
    scale in bfloat16: twice as fast as `F.linear` in bfloat16. Other dtypes have one too, without vectors, a tenth as
    fast; here they are computed in float32, which saves memory and, but for large weights, no time.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return reference.int8_linear(x, weight, scale, bias)
    checks.int8_linear(x, weight, scale, bias)
    autocast = runtime.autocast_dtype(x.device)
    x = x.to(autocast or x.dtype)
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    with nullcontext() if autocast is None else torch.autocast("cpu", enabled=False):
        # the private product reads vectors whole, and past the end of rows that are no multiple of one
        packed = rows.dtype == torch.bfloat16 and len(rows) <= _FEW_ROWS and rows.shape[1] % 64 == 0
        if packed and pytorch_internals.has_int8pack_mm():
            y = pytorch_internals.int8pack_mm(rows.contiguous(), weight.contiguous(), scale.to(rows.dtype))  # [M, N]
            y = y if bias is None else y + bias
        else:
            y = _int8_by_parts(rows, weight, scale, bias)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _int8_by_parts(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x [M, K] @ weight.T * scale + bias, [M, N], a few outputs' weights made floating numbers at a time."""
    n_outputs, width = weight.shape
    wide = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32  # integers up to 127 are exact in both
    rows = x.to(wide)
    step = min(n_outputs, max(1, _WEIGHT_BYTES // (width * wide.itemsize)))
    part = torch.empty(step, width, dtype=wide)
    y = torch.empty(len(x), n_outputs, dtype=x.dtype)
    for first in range(0, n_outputs, step):
        outputs = slice(first, min(first + step, n_outputs))
        weights = part[: outputs.stop - first].copy_(weight[outputs])
        result = F.linear(rows, weights) * scale[outputs]  # [M, step] in float32
        y[:, outputs] = result if bias is None else result + bias[outputs]
    return y
