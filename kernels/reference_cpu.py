"""Faster implementations of the operators on CPUs, in PyTorch: the backend "cpu".

The namespace has the names and signatures of `kernels.reference`. What is not faster here, and every tensor on another
device, goes to the reference.

- Dropout draws 16 random bits an element, a quarter of what PyTorch draws.
- The backward of PyTorch's attention takes ten times as long in half precision as in float32, and with dropout PyTorch
  computes attention unfused in float32. Here it is matmuls in the given dtype: CPUs with bfloat16 instructions run
  them four times as fast as float32.
- Decoding does not read the KV cache past the longest sequence.
- int8 weights go to PyTorch's int8 matmul, or are dequantized in parts that stay in the cache.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import checks, pytorch_internals, reference, runtime
from kernels.reference import OPERATORS, quantize_int8

__all__ = [*OPERATORS, "quantize_int8"]

# beyond this length the probabilities, saved for the backward, would dominate the memory of a step
_MAX_LENGTH = 512
_TILE = 2**20  # scores computed at a time: they stay in the cache
_WEIGHT_BYTES = 2**21  # int8 weights dequantized at a time: they stay in the cache
_MAX_INT8_ROWS = 16  # the time of PyTorch's int8 matmul grows with each row: with more rows it is slower


def __getattr__(name: str) -> Any:
    """Return the reference's operator where none is defined here."""
    if name in OPERATORS:
        return getattr(reference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def dropout(x: Tensor, dropout_p: float) -> Tensor:
    """Apply `F.dropout` in training mode, several times as fast. The probability is rounded to a multiple of 2**-16."""
    if torch.compiler.is_compiling():
        return F.dropout(x, dropout_p)
    kept, scale = _dropout_mask(x.shape, dropout_p)
    return x * kept * scale


def _dropout_mask(shape: torch.Size | tuple[int, ...], dropout_p: float) -> tuple[Tensor, float]:
    """Return a random mask, 1 with probability 1 - dropout_p and else 0, and the scale of the elements that stay."""
    count = torch.Size(shape).numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = round(dropout_p * 2**16)
    kept = (bits[:count] >= dropped - 2**15).view(torch.uint8)  # multiplying by bool takes four times as long
    return kept.view(shape), 1.0 / (1.0 - dropped / 2**16)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `kernels.reference.add_layer_norm` with a faster dropout."""
    if dropout_p > 0.0 and seed is None:
        checks.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)
        if x.device.type == "cpu":
            x, dropout_p = dropout(x, dropout_p), 0.0
    return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)


def causal_attention_qkvpacked(
    qkv: Tensor, scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """Compute `kernels.reference.causal_attention_qkvpacked`.

    Half precision and dropout have no second derivative.
    """
    checks.causal_attention_qkvpacked(qkv, scale, dropout_p, seed)
    slow = qkv.device.type == "cpu" and (qkv.dtype.itemsize < 4 or dropout_p > 0.0)
    if not slow or seed is not None or qkv.numel() == 0 or torch.compiler.is_compiling():
        return reference.causal_attention_qkvpacked(qkv, scale, dropout_p, seed)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        if dropout_p == 0.0 and qkv.shape[1] > _MAX_LENGTH:
            return reference.causal_attention_qkvpacked(qkv.float(), scale).to(qkv.dtype)
        return _Attention.apply(qkv, scale, dropout_p)


class _Attention(torch.autograd.Function):
    """Causal attention of qkv [B, T, 3, H, D] -> [B, T, H, D] that saves its probabilities for the backward."""

    @staticmethod
    def forward(ctx, qkv: Tensor, scale: float, dropout_p: float) -> Tensor:
        B, T, _, H, D = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).reshape(3, B * H, T, D)
        mask = _causal_mask(T, qkv.dtype)
        p = q.new_empty(B * H, T, T)
        kept, dropout_scale = _dropout_mask(p.shape, dropout_p) if dropout_p > 0.0 else (None, 1.0)
        o = torch.empty_like(q)
        for heads in _tiles(B * H, T):
            torch.softmax(torch.baddbmm(mask, q[heads], k[heads].mT, alpha=scale), -1, out=p[heads])
            torch.bmm(p[heads] if kept is None else p[heads] * kept[heads], v[heads], out=o[heads])
        ctx.save_for_backward(q, k, v, p, kept)
        ctx.scale, ctx.dropout_scale, ctx.batch = scale, dropout_scale, B
        return (o if kept is None else o.mul_(dropout_scale)).view(B, H, T, D).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, do: Tensor) -> tuple[Tensor, None, None]:
        q, k, v, p, kept = ctx.saved_tensors
        B, (BH, T, D) = ctx.batch, q.shape
        do = do.transpose(1, 2).reshape(BH, T, D)
        if kept is not None:
            do = do * ctx.dropout_scale
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
def _causal_mask(length: int, dtype: torch.dtype) -> Tensor:
    """Return [T, T], minus infinity where a key comes after the query."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def _tiles(heads: int, length: int) -> list[slice]:
    """Return slices of [B * H]: the heads that are computed together."""
    step = max(1, _TILE // length**2)
    return [slice(first, first + step) for first in range(0, heads, step)]


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Compute `kernels.reference.decode_attention` without reading the cache past the longest sequence."""
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
    """Compute `kernels.reference.int8_linear` without all weights in float32 at once.

    Up to 16 rows in bfloat16 go to PyTorch's int8 matmul, which reads one byte a weight and takes the scale in
    bfloat16: twice as fast as `F.linear` in bfloat16. For other dtypes that matmul is not vectorised and a tenth as
    fast, so they are dequantized: that saves memory, and time with large weights only.
    """
    checks.int8_linear(x, weight, scale, bias)
    if x.device.type != "cpu" or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return reference.int8_linear(x, weight, scale, bias)
    autocast = runtime.autocast_dtype(x.device)
    x = x.to(autocast or x.dtype)
    rows = x.reshape(-1, x.shape[-1])  # [M, K]
    with nullcontext() if autocast is None else torch.autocast("cpu", enabled=False):
        # int8pack_mm reads whole vectors, past the end of rows whose length is not a multiple of 64
        packed = rows.dtype == torch.bfloat16 and len(rows) <= _MAX_INT8_ROWS and rows.shape[1] % 64 == 0
        if packed and pytorch_internals.has_int8pack_mm():
            y = pytorch_internals.int8pack_mm(rows.contiguous(), weight.contiguous(), scale.to(rows.dtype))  # [M, N]
            y = y if bias is None else y + bias
        else:
            y = _int8_in_parts(rows, weight, scale, bias)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _int8_in_parts(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x [M, K] @ weight.T * scale + bias, [M, N]. Dequantizes the weights of a few outputs at a time."""
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
