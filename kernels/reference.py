"""The operators in plain PyTorch: the definition of correct, and the backend "eager".

Names and signatures are those of `kernels`, whose docstrings take the sections from Args on from here. Every floating
dtype (in float64 this file is the tests' oracle), every device of PyTorch, and every derivative that PyTorch has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import checks, runtime

_INT8_MAX = 127  # symmetric: -128 has no opposite
_Operator = TypeVar("_Operator", bound=Callable)

# each operator, and the module of `kernels` with its Triton kernels
OPERATORS = {
    "add_layer_norm": "norm",
    "causal_attention": "attention",
    "causal_attention_qkvpacked": "attention",
    "decode_attention": "decode",
    "gelu_ffn": "ffn",
    "int8_linear": "int8",
    "layer_norm": "norm",
    "linear_cross_entropy": "cross_entropy",
}


def document_arguments(operator: _Operator) -> _Operator:
    """Append the sections Args, Returns and Raises of the reference to the docstring of a Triton operator."""
    sections = (inspect.getdoc(globals()[operator.__name__]) or "").partition("Args:")
    operator.__doc__ = f"""{inspect.cleandoc(operator.__doc__ or "")}

Floating tensors are float32, float16 or bfloat16, with any strides. Results are bitwise reproducible. Where Triton
cannot run (CPU tensors), this is `kernels.reference.{operator.__name__}`.

{"".join(sections[1:])}"""
    return operator


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise each row: (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    Parameters may have another dtype than x: the arithmetic is then in float32.

    Args:
        x: [..., C].
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        eps: added to the biased variance, inside the root.
        dtype: of the result; None for that of x, or float32 under CUDA's `torch.autocast`. Pass a following matmul's
            dtype to save a cast.

    Returns:
        [..., C] in `dtype`.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
    """
    checks.layer_norm(x, weight, bias, eps, dtype)
    return _norm(x, weight, bias, eps, dtype)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None) -> Tensor:
    parameters = [parameter for parameter in (weight, bias) if parameter is not None]
    one_dtype = all(parameter.dtype == x.dtype for parameter in parameters)
    # autocast casts by itself, but on a CPU it cannot mix half-precision parameters with float32
    if one_dtype or (x.device.type != "cpu" and runtime.autocast_dtype(x.device) is not None):
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        return y if dtype is None else y.to(dtype)
    weight, bias = (None if parameter is None else parameter.float() for parameter in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(dtype or x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Residual addition and layer norm: h = residual + dropout(x), y = layer_norm(h).

    Args:
        x: [..., C], the output of a sublayer.
        residual: [..., C], the residual stream before it, in any floating dtype.
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        eps: added to the biased variance, inside the root.
        dropout_p: the probability, in [0, 1), that an element of x is zeroed; the others are divided by 1 - dropout_p.
        seed: of the dropout mask, an int or a one-element int64 tensor on the device of x, which CUDA graphs and
            activation checkpointing replay. None draws from PyTorch's generator. With one seed, the reference and the
            Triton operator (Philox) have different masks.
        dtype: of y; None for that of h. Then both are float32 under CUDA's `torch.autocast`.

    Returns:
        y and h, both [..., C]; y in `dtype`, h in the wider dtype of x and residual.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
    """
    checks.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)
    if dropout_p > 0.0 and seed is not None:
        generator = torch.Generator(x.device).manual_seed(int(seed))
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= dropout_p
        return add_layer_norm_with_mask(x, residual, weight, bias, eps, dropout_p, kept, dtype)
    h = residual + (F.dropout(x, dropout_p) if dropout_p > 0.0 else x)
    return _norm(h, weight, bias, eps, dtype), h


def add_layer_norm_with_mask(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float, kept: Tensor,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute `add_layer_norm` with the dropout mask `kept` [..., C], true where x stays."""
    h = residual + x * kept / (1.0 - dropout_p)
    return _norm(h, weight, bias, eps, dtype), h


def activate(x: Tensor, activation: str) -> Tensor:
    """Apply `gelu_tanh`, `gelu` (erf; Hendrycks and Gimpel 2016, arXiv:1606.08415) or `relu` elementwise."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def gelu_ffn(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, activation: str = "gelu_tanh",
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Apply the feed-forward of a transformer block: activation(x @ w_up.T + b_up) @ w_down.T + b_down.

    Args:
        x: [..., C].
        w_up: [F, C], as in `nn.Linear(C, F)`.
        b_up: [F] or None.
        w_down: [C, F], as in `nn.Linear(F, C)`.
        b_down: [C] or None.
        activation: `gelu_tanh` (GPT-2's), `gelu` (erf) or `relu`.
        implementation: `fused` or `unfused` for forward and backward. `auto` takes for each the one that was measured
            to be faster for this dtype, shape and chip, or is estimated to be faster without a measurement. The
            reference ignores it.

    Returns:
        [..., C] in the dtype of the inputs, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
    """
    checks.gelu_ffn(x, w_up, b_up, w_down, b_down, activation, implementation)
    return F.linear(activate(F.linear(x, w_up, b_up), activation), w_down, b_down)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute softmax(scale * q @ k.T + causal mask) @ v (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

    The mask is aligned to the end: query i attends to keys j <= i + S - T.

    Args:
        q: [B, H, T, D].
        k: [B, H, S, D] with S >= T.
        v: [B, H, S, D].
        scale: multiplies the scores; D**-0.5 if None.
        dropout_p: the probability, in [0, 1), that a softmax weight is zeroed; the others are divided by 1 - dropout_p.
        seed: of the dropout mask, as in `add_layer_norm`.

    Returns:
        [B, H, T, D] in the dtype of the inputs, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
    """
    checks.causal_attention(q, k, v, scale, dropout_p, seed)
    queries, keys = q.shape[2], k.shape[2]
    keep = None if queries == keys else causal_mask(queries, keys, q.device)
    if dropout_p > 0.0 and seed is not None:
        generator = torch.Generator(q.device).manual_seed(int(seed))
        kept = torch.rand(*q.shape[:3], keys, generator=generator, device=q.device) >= dropout_p
        return attention_with_mask(q, k, v, scale, dropout_p, kept)
    if scale is not None and scale <= 0.0:
        # on CPUs PyTorch multiplies the -inf of its causal mask by the scale
        q, scale = (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=keep, dropout_p=dropout_p, is_causal=keep is None, scale=scale
    )


def causal_attention_qkvpacked(
    qkv: Tensor, scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """Compute `causal_attention` of queries, keys and values packed in one tensor, the output of one projection.

    Args:
        qkv: [B, T, 3, H, D], with queries, keys and values along the third dimension.
        scale: multiplies the scores; D**-0.5 if None.
        dropout_p: as in `causal_attention`.
        seed: as in `causal_attention`.

    Returns:
        [B, T, H, D], contiguous, in the dtype of qkv, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
    """
    checks.causal_attention_qkvpacked(qkv, scale, dropout_p, seed)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, T, D] each
    return causal_attention(q, k, v, scale, dropout_p, seed).transpose(1, 2).contiguous()


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Attend from each sequence's last T tokens to the first `lengths` keys of its cache, which include their own.

    Args:
        q: [B, H, T, D]. The last query attends to all of those keys, each earlier one to one fewer.
        k_cache: [B, H, S, D].
        v_cache: [B, H, S, D].
        lengths: [B] int32 or int64, on the device of q: the number of valid keys of each sequence, clamped to S. A
            query without keys returns 0.
        scale: multiplies the scores; D**-0.5 if None.

    Returns:
        [B, H, T, D] in the dtype of the inputs, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
    """
    checks.decode_attention(q, k_cache, v_cache, lengths, scale)
    queries, keys = q.shape[2], k_cache.shape[2]
    visible = lengths[:, None]  # [B, 1]: keys that a query attends to
    if queries > 1:
        visible = lengths.clamp(max=keys)[:, None] + torch.arange(1 - queries, 1, device=q.device)  # [B, T]
    visible = visible[:, None, :, None]  # [B, 1, T, 1]
    mask = torch.arange(keys, device=q.device) < visible  # [B, 1, T, S]
    o = F.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, scale=scale)
    return o.masked_fill(visible <= 0, 0.0)


@torch.no_grad()
def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a matrix to multiples of its largest magnitude over 127: weight is about q * scale[:, None].

    Symmetric absmax quantization of each output (Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2.1, by
    rows of the weight), to the nearest integer, ties to even. |weight - q * scale[:, None]| is at most scale / 2, up
    to rounding in float32.

    Args:
        weight: [N, K] float32, float16, bfloat16 or float64, as in `nn.Linear(K, N)`.

    Returns:
        q [N, K] int8 in [-127, 127], and scale [N] float32. A row of zeros has the scale 1. So has a row whose scale
        would be subnormal in float32: it becomes zeros.

    Raises:
        TypeError: a weight that is not a tensor or has another dtype.
        ValueError: a weight that is not [N, K] with N and K >= 1, or that is not finite in float32.
    """
    checks.quantize_int8(weight)
    low, high = torch.aminmax(weight, dim=1)  # [N] each; NaN in rows that hold one
    absmax = torch.maximum(-low, high).float()
    if not weight.is_meta and not absmax.isfinite().all():
        row = int(absmax.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"quantize_int8: weight must be finite in float32, got NaN or infinity in row {row}")
    scale = absmax / _INT8_MAX
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)  # [N]
    quotients = weight / scale[:, None]  # [N, K], in float32 at least
    # the rounding of the scale may take a quotient past 127
    return quotients.round_().clamp_(-_INT8_MAX, _INT8_MAX).to(torch.int8), scale


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute (x @ weight.T) * scale + bias with int8 weights, in float32, or in float64 for float64 x. No derivative.

    Args:
        x: [..., K].
        weight: [N, K] int8, from `quantize_int8`.
        scale: [N] float32, of each output.
        bias: [N] in any floating dtype, or None.

    Returns:
        [..., N] in the dtype of x, or autocast's.

    Raises:
        ValueError, TypeError: an argument that does not fit, named with what is accepted, or requires a gradient.
    """
    checks.int8_linear(x, weight, scale, bias)
    autocast = runtime.autocast_dtype(x.device)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with nullcontext() if autocast is None else torch.autocast(x.device.type, enabled=False):
        x = x.to(autocast or x.dtype)
        y = F.linear(x.to(wide), weight.to(wide)) * scale  # [..., N]
        return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean",
    vocab_size: int | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0, workspace_bytes: int = 2**29,
) -> Tensor:  # fmt: skip
    """Compute the cross-entropy of softmax(x @ weight.T) and targets. Half-precision logits are cast to float32.

    Args:
        x: [..., C].
        weight: [V, C], as in `nn.Linear(C, V)`.
        targets: [...] int64 classes, in [0, vocab_size) or `ignore_index`. On a GPU they are not checked, which would
            synchronise: in the Triton operator, one out of range makes the loss and the gradients NaN.
        ignore_index: the target of rows that do not count.
        reduction: `mean` over the rows that count (NaN where none does), `sum`, or `none`.
        vocab_size: the number of classes; rows of weight beyond it are padding. V if None.
        label_smoothing: the share of the target spread evenly over all classes (Szegedy et al. 2015,
            arXiv:1512.00567), in [0, 1].
        z_loss: the weight of log(Z)^2, which keeps the softmax's normaliser near 1 (Chowdhery et al. 2022,
            arXiv:2204.02311, section 5).
        workspace_bytes: the maximum size of a chunk's logits, at least one row. Matmuls need about 2,000 rows to be
            fast. The reference ignores it: all logits are in memory.

    Returns:
        The loss, a scalar, or [...] with reduction "none", where ignored rows have 0; float32, or float64 for float64
        inputs.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype, device or value does not fit, with what is accepted.
    """
    checks.linear_cross_entropy(
        x, weight, targets, ignore_index, reduction, vocab_size, label_smoothing, z_loss, workspace_bytes
    )
    logits = F.linear(x, weight)[..., :vocab_size]  # [..., classes]
    return cross_entropy(logits, targets, ignore_index, reduction, label_smoothing, z_loss)


def cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Compute `linear_cross_entropy` from logits [..., classes]."""
    rows = logits.reshape(-1, logits.shape[-1])  # [N, classes]
    rows = rows.float() if rows.dtype.itemsize < 4 else rows
    flat = targets.reshape(-1)  # [N]
    loss = F.cross_entropy(rows, flat, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    if z_loss > 0.0:
        counted = flat != ignore_index
        squares = rows.logsumexp(-1).square().masked_fill(~counted, 0.0)  # [N]
        if reduction != "none":
            squares = squares.sum() / (counted.sum() if reduction == "mean" else 1)
        loss = loss + z_loss * squares
    return loss.view(targets.shape) if reduction == "none" else loss


def attention_with_mask(q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout_p: float, kept: Tensor) -> Tensor:
    """Compute causal attention with the dropout mask `kept` [B, H, T, S]. Materialises the scores."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * (q @ k.transpose(-2, -1))  # [B, H, T, S]
    scores = scores.masked_fill(~causal_mask(q.shape[2], k.shape[2], q.device), float("-inf"))
    probabilities = scores.softmax(-1) * kept / (1.0 - dropout_p)
    return probabilities.to(v.dtype) @ v


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Return [T, S], true where query i attends to key j: j <= i + S - T."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
