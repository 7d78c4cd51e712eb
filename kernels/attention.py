"""Causal attention that never holds the score matrix: online softmax forward, recomputed probabilities backward.

The method is FlashAttention-2's (Dao 2023, arXiv:2307.08691). The backward is two kernels, one that owns keys and one
that owns queries, so that every gradient is summed in one place and in one order: no atomics, the same bits every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.attention_launch import launch_backward, launch_forward
from kernels.workload import CodegenCase, WarmupCase, Workload


def _empty_like_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] stored as [B, T, H, D]: what the output projection reads without a copy."""
    batch, heads, length, head_size = x.shape
    return x.new_empty(batch, length, heads, head_size).transpose(1, 2)


def _compute(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    o = _empty_like_heads(q)
    return o, launch_forward(
        runtime.unit_stride(q), runtime.unit_stride(k), runtime.unit_stride(v), o, scale, dropout_p, seed
    )


_forward = torch.library.custom_op("gptfast::causal_attention", _compute, mutates_args=())


@_forward.register_fake
def _(q, k, v, scale, dropout_p, seed):
    return _empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gptfast::causal_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = (_empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v))
    inputs = (runtime.unit_stride(do), runtime.unit_stride(q), runtime.unit_stride(k), runtime.unit_stride(v))
    launch_backward(*inputs, o, lse, *gradients, scale, dropout_p, seed)
    return gradients


@_backward.register_fake
def _(do, q, k, v, o, lse, scale, dropout_p, seed):
    return _empty_like_heads(q), _empty_like_heads(k), _empty_like_heads(v)


def _save_for_backward(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, *output, seed)
    ctx.set_materialize_grads(False)


def _gradients(ctx, do, _dlse):
    if do is None:
        return (None,) * 6
    *tensors, seed = ctx.saved_tensors
    return *_backward(do, *tensors, ctx.scale, ctx.dropout_p, seed), None, None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.gptfast.causal_attention)
def _forward_flops(q_shape, k_shape, *args, **kwargs) -> int:
    """Two products with the full score matrix: the convention of PyTorch's own formula, causality not counted."""
    return 4 * q_shape.numel() * k_shape[2]


@register_flop_formula(torch.ops.gptfast.causal_attention_backward)
def _backward_flops(do_shape, q_shape, k_shape, *args, **kwargs) -> int:
    """Five products: the scores again, dP, dV, dK and dQ; as PyTorch's formula."""
    return 10 * q_shape.numel() * k_shape[2]


def _heads_of(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [B, H, T, D] each, as views of [B, T, 3, H, D]."""
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    return q, k, v


def _packed_compute(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_of(runtime.unit_stride(qkv))
    o = _empty_like_heads(q)
    lse = launch_forward(q, k, v, o, scale, dropout_p, seed)
    return o.transpose(1, 2), lse  # [B, T, H, D]


_packed_forward = torch.library.custom_op("gptfast::causal_attention_qkvpacked", _packed_compute, mutates_args=())


@_packed_forward.register_fake
def _(qkv, scale, dropout_p, seed):
    batch, length, _, heads, head_size = qkv.shape
    o = qkv.new_empty(batch, length, heads, head_size)
    return o, qkv.new_empty((batch, heads, length), dtype=torch.float32)


@torch.library.custom_op("gptfast::causal_attention_qkvpacked_backward", mutates_args=())
def _packed_backward(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """One gradient tensor, [B, T, 3, H, D]: nothing is split, nothing joined."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    launch_backward(
        runtime.unit_stride(do).transpose(1, 2), *_heads_of(runtime.unit_stride(qkv)), o.transpose(1, 2), lse,
        *_heads_of(dqkv), scale, dropout_p, seed,
    )  # fmt: skip
    return dqkv


@_packed_backward.register_fake
def _(do, qkv, o, lse, scale, dropout_p, seed):
    return qkv.new_empty(qkv.shape)


def _packed_save_for_backward(ctx, inputs, output):
    qkv, ctx.scale, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, *output, seed)
    ctx.set_materialize_grads(False)


def _packed_gradients(ctx, do, _dlse):
    if do is None:
        return (None,) * 4
    qkv, o, lse, seed = ctx.saved_tensors
    return _packed_backward(do, qkv, o, lse, ctx.scale, ctx.dropout_p, seed), None, None, None


_packed_forward.register_autograd(_packed_gradients, setup_context=_packed_save_for_backward)


@register_flop_formula(torch.ops.gptfast.causal_attention_qkvpacked)
def _packed_forward_flops(qkv_shape, *args, **kwargs) -> int:
    """As `_forward_flops`: the score matrix has T rows for each of the B * H heads."""
    return 4 * qkv_shape.numel() // 3 * qkv_shape[1]


@register_flop_formula(torch.ops.gptfast.causal_attention_qkvpacked_backward)
def _packed_backward_flops(do_shape, qkv_shape, *args, **kwargs) -> int:
    return 10 * qkv_shape.numel() // 3 * qkv_shape[1]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T + causal mask) @ v, the mask aligned to the end: query i sees keys j <= i + S - T.

    FlashAttention-2 (Dao 2023, arXiv:2307.08691): memory grows with T, not T * S. Inputs are read by their strides.
    Bitwise the same on every run, gradients included. float32 inputs follow
    `torch.get_float32_matmul_precision()`. Where Triton cannot run (CPU tensors), this is
    `kernels.reference.causal_attention`.

    Args:
        q: [B, H, T, D], D at most 256, float32, float16 or bfloat16.
        k: [B, H, S, D] with S >= T.
        v: [B, H, S, D].
        scale: multiplies the scores; D**-0.5 if None.
        dropout_p: the share of probabilities set to zero, in [0, 1); the others grow by 1 / (1 - dropout_p).
        seed: of the dropout's Philox generator, an int or a one-element int64 tensor on the device of q; None draws
            one from PyTorch's generator of that device, without synchronising.

    Returns:
        [B, H, T, D] in the dtype of the inputs, or autocast's, stored as [B, T, H, D]: `o.transpose(1, 2)` is
        contiguous.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.causal_attention(q, k, v, scale, dropout_p, seed)
    if not tile.launchable(q.device):
        return reference.causal_attention(q, k, v, scale, dropout_p, seed)
    runtime.require_head_size("causal_attention", q)
    dtype = runtime.autocast_dtype(q.device)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seed = runtime.dropout_seed(dropout_p, seed, q.device)
    forward = _compute if runtime.can_skip_dispatcher(q, k, v) else _forward
    o, _ = forward(q, k, v, runtime.scale_or_default(scale, q.shape[3]), float(dropout_p), seed)
    return o


def causal_attention_qkvpacked(
    qkv: Tensor,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Causal attention of queries, keys and values as one projection writes them, with one gradient for the three.

    `causal_attention` of equal lengths, bit for bit; the backward writes the gradient of qkv itself, where three
    gradients would have to be joined by a copy.

    Args:
        qkv: [B, T, 3, H, D]: queries, keys and values along the third dimension. D at most 256, float32, float16 or
            bfloat16.
        scale: multiplies the scores; D**-0.5 if None.
        dropout_p: as in `causal_attention`.
        seed: as in `causal_attention`.

    Returns:
        [B, T, H, D], contiguous, in the dtype of qkv, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.causal_attention_qkvpacked(qkv, scale, dropout_p, seed)
    if not tile.launchable(qkv.device):
        return reference.causal_attention_qkvpacked(qkv, scale, dropout_p, seed)
    runtime.require_head_size("causal_attention_qkvpacked", qkv)
    dtype = runtime.autocast_dtype(qkv.device)
    if dtype is not None:
        qkv = qkv.to(dtype)
    seed = runtime.dropout_seed(dropout_p, seed, qkv.device)
    forward = _packed_compute if runtime.can_skip_dispatcher(qkv) else _packed_forward
    o, _ = forward(qkv, runtime.scale_or_default(scale, qkv.shape[4]), float(dropout_p), seed)
    return o


def codegen_cases(dtype: torch.dtype) -> Iterator[CodegenCase]:
    """Each padded width of a head, and one that is not a power of two, with dropout and without."""
    for head_size in (64, 80, 128, 256):
        q = torch.empty(1, 2, 256, head_size, dtype=dtype)
        lse = torch.empty(1, 2, 256, dtype=torch.float32)
        for seed in (None, torch.zeros(1, dtype=torch.int64)):
            case = f"causal_attention D={head_size}" + ("" if seed is None else " dropout")
            yield case, _forward, (q, q, q, 0.1, 0.1, seed)
            yield case, _backward, (q, q, q, q, q, lse, 0.1, 0.1, seed)


def warmup_cases(workload: Workload) -> Iterator[WarmupCase]:
    """Sequences that attend to themselves; in the decode stage, chunks of prompts that attend to a KV cache."""
    batch, heads, size, dtype = workload.batch_size, workload.model.n_head, workload.head_size, workload.matmul_dtype

    def qkv(length: int) -> tuple[Tensor, Tensor, Tensor]:
        return _heads_of(workload.tensor(batch, min(length, workload.length), 3, heads, size, dtype=dtype))

    if workload.stage != "decode":
        yield partial(causal_attention, *qkv(workload.length), dropout_p=workload.dropout_p)
        return
    cache = workload.tensor(batch, heads, workload.length, size, dtype=dtype)
    for chunk in (16, 17):
        q, _, _ = qkv(chunk)
        for seen in (chunk, 32, 33, workload.length):
            keys = cache[:, :, : max(q.shape[2], min(seen, workload.length))]
            yield partial(causal_attention, q, keys, keys)
