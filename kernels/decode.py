"""Attention of the last tokens of sequences over caches of keys and values: what generation does for every token.

The work is reading the cache. It is split over the keys as well as over the heads, so that few sequences fill the GPU
too; each part keeps its own softmax, and a second kernel merges them (Dao et al. 2023, "Flash-Decoding"). How many
parts is decided from the shapes alone, how long they are from the lengths, on the device: nothing waits for the host.
Each query has programs of its own; those of one head run side by side, and all but one find its keys in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.tuning import Config, Tunable
from kernels.workload import CodegenCase, WarmupCase, Workload


@triton.jit
def _decode_part_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, o_ptr, part_o_ptr, part_lse_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, n_heads, n_queries, n_keys, scale_log2,
    PARTS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One part of the keys that one query sees: its softmax-weighted values, and their log2-sum-exp2."""
    row, part = tl.program_id(0), tl.program_id(1)
    batch_head, query = row // n_queries, row % n_queries
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    # a length beyond the cache would read what is not its own
    length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), n_keys)
    length = tl.maximum(length - (n_queries - 1 - query), 0)
    rows = tl.cdiv(tl.cdiv(length, PARTS), BN) * BN
    first, last = part * rows, tl.minimum((part + 1) * rows, length)
    cols = tl.arange(0, BD)
    q_ptr += batch * stride_q_batch + head * stride_q_head + query.to(tl.int64) * stride_q_row
    q = tl.load(q_ptr + cols, mask=cols < D, other=0.0)  # [BD]
    q = q.to(tl.float32) * scale_log2
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    acc = tl.zeros([BD], dtype=tl.float32)
    total = tl.zeros([BN], dtype=tl.float32)  # of each lane; added up at the end
    highest = tl.full([1], float("-inf"), dtype=tl.float32)
    for start in range(first, last, BN):
        keys = start + tl.arange(0, BN)
        mask = (keys < last)[:, None] & (cols < D)[None, :]
        k = tl.load(k_ptr + keys.to(tl.int64)[:, None] * stride_k_row + cols[None, :], mask=mask, other=0.0)  # [BN, BD]
        scores = tl.where(keys < last, tl.sum(k.to(tl.float32) * q[None, :], axis=1), float("-inf"))  # [BN]
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        shrink = tl.exp2(highest - higher)
        p = tl.exp2(scores - higher)
        v = tl.load(v_ptr + keys.to(tl.int64)[:, None] * stride_v_row + cols[None, :], mask=mask, other=0.0)  # [BN, BD]
        acc = acc * shrink + tl.sum(p[:, None] * v.to(tl.float32), axis=0)
        total = total * shrink + p
        highest = higher
    sum_p = tl.sum(total, axis=0)
    # a part without keys has the weight 0 and the value 0
    sum_p = tl.where(sum_p > 0.0, sum_p, 1.0)
    acc = acc / sum_p
    if PARTS == 1:
        tl.store(o_ptr + row.to(tl.int64) * D + cols, acc.to(o_ptr.dtype.element_ty), mask=cols < D)
    else:
        slot = row.to(tl.int64) * PARTS + part
        tl.store(part_o_ptr + slot * D + cols, acc, mask=cols < D)
        tl.store(part_lse_ptr + slot + tl.arange(0, 1), highest + tl.log2(sum_p))


@triton.jit
def _decode_merge_kernel(
    part_o_ptr, part_lse_ptr, o_ptr, PARTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """The values of all parts of one query, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    slots = row * PARTS + tl.arange(0, PARTS)
    cols = tl.arange(0, BD)
    lse = tl.load(part_lse_ptr + slots)  # [PARTS]
    highest = tl.max(lse, axis=0)
    # without any key all are -inf, and -inf less -inf is no number
    weight = tl.exp2(lse - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(weight, axis=0)
    o = tl.load(part_o_ptr + slots[:, None] * D + cols[None, :], mask=(cols < D)[None, :], other=0.0)  # [PARTS, BD]
    o = tl.sum(o * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(o_ptr + row * D + cols, o.to(o_ptr.dtype.element_ty), mask=cols < D)


def _blocks(head_size: int, elements: int, warps: int) -> Config:
    """About `elements` numbers of keys and as many of values on their way for each program.

    Programs for `per_processor` on each, and parts of no less than `shortest` keys: merging more costs more than it
    saves.
    """
    keys = max(16, min(256, elements // head_size))
    warps = max(warps, 8) if head_size > 128 else warps  # rows of such heads are long
    return {"BN": keys, "num_warps": warps, "per_processor": 4, "shortest": max(keys, 128)}


def _choices(architecture: str, head_size: int, keys: int, heads: int, dtype: torch.dtype) -> list[Config]:
    # of float32, 4096 numbers by four warps would spill
    sizes = ((2048, 4), (8192, 8)) if dtype == torch.float32 else ((4096, 4), (8192, 8), (2048, 4))
    return [_blocks(head_size, elements, warps) for elements, warps in sizes]


_PART = Tunable("decode", _choices)
_MOST_PARTS = 64


def _parts(rows: int, n_keys: int, device: torch.device, options: Config) -> int:
    """How many parts the keys are split into: a power of two, from the shapes alone."""
    programs = runtime.program_count(device, options["per_processor"])
    parts = min(runtime.cdiv(programs, rows), runtime.cdiv(n_keys, options["shortest"]), _MOST_PARTS)
    return runtime.next_power_of_2(max(parts, 1))


def _compute(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float) -> Tensor:
    q, k_cache, v_cache = runtime.unit_stride(q), runtime.unit_stride(k_cache), runtime.unit_stride(v_cache)
    batch, heads, n_queries, head_size = q.shape
    rows, n_keys = batch * heads * n_queries, k_cache.shape[2]
    o = torch.empty(batch, heads, n_queries, head_size, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    lengths = lengths.contiguous()
    width = runtime.padded_head_size(head_size)

    def launch(options: Config) -> None:
        parts = _parts(rows, n_keys, q.device, options)
        slots = rows * parts if parts > 1 else 0
        part_o = torch.empty(slots, head_size, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(slots, dtype=torch.float32, device=q.device)
        with runtime.on_device(q):
            _decode_part_kernel[(rows, parts)](
                q, k_cache, v_cache, lengths, o, part_o, part_lse, *q.stride()[:3],
                *k_cache.stride()[:3], *v_cache.stride()[:3], heads, n_queries, n_keys, scale * runtime.LOG2_E,
                PARTS=parts, D=head_size, BD=width, BN=options["BN"], num_warps=options["num_warps"],
            )  # fmt: skip
            if parts > 1:
                _decode_merge_kernel[(rows,)](part_o, part_lse, o, PARTS=parts, D=head_size, BD=width, num_warps=8)

    _PART.launch(launch, q.device, width, runtime.next_power_of_2(n_keys), rows, q.dtype)
    return o


_forward = torch.library.custom_op("gptfast::decode_attention", _compute, mutates_args=())


@_forward.register_fake
def _(q, k_cache, v_cache, lengths, scale):
    return q.new_empty(q.shape)


@register_flop_formula(torch.ops.gptfast.decode_attention)
def _flops(q_shape, k_shape, *args, **kwargs) -> int:
    """Two products with the whole cache: the lengths are not known from shapes."""
    return 4 * q_shape.numel() * k_shape[2]


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """softmax(scale * q @ k.T) @ v of each sequence's last T tokens over the first `lengths` keys of its cache.

    Those keys are the tokens' own too: the last query sees all of them, each before it one less. For generation: no
    gradient. Split over the keys (Dao et al. 2023, "Flash-Decoding"), bitwise the same on every run, without a look at
    the lengths from the host: CUDA graphs may replay it while the lengths grow. Where Triton cannot run (CPU tensors),
    this is `kernels.reference.decode_attention`.

    Args:
        q: [B, H, T, D], T at least 1 and mostly 1, D at most 256, float32, float16 or bfloat16.
        k_cache: [B, H, S, D], any strides.
        v_cache: [B, H, S, D].
        lengths: [B] int32 or int64, on the device of q: how many keys of each sequence count. Beyond S they are S; a
            query that sees none has the result 0.
        scale: multiplies the scores; D**-0.5 if None.

    Returns:
        [B, H, T, D], contiguous, in the dtype of the inputs, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a derivative.
    """
    checks.decode_attention(q, k_cache, v_cache, lengths, scale)
    if not tile.launchable(q.device):
        return reference.decode_attention(q, k_cache, v_cache, lengths, scale)
    runtime.require_head_size("decode_attention", q)
    dtype = runtime.autocast_dtype(q.device)
    if dtype is not None:
        q, k_cache, v_cache = q.to(dtype), k_cache.to(dtype), v_cache.to(dtype)
    forward = _compute if runtime.can_skip_dispatcher(q, k_cache, v_cache) else _forward
    return forward(q, k_cache, v_cache, lengths, runtime.scale_or_default(scale, q.shape[3]))


def codegen_cases(dtype: torch.dtype) -> Iterator[CodegenCase]:
    """One query of each sequence, and those of speculative decoding."""
    for head_size in (64, 80, 128, 256):
        cache = torch.empty(1, 2, 4096, head_size, dtype=dtype)
        lengths = torch.zeros(1, dtype=torch.int64)
        for queries in (1, 5):
            q = torch.empty(1, 2, queries, head_size, dtype=dtype)
            yield f"decode_attention D={head_size} T={queries}", _compute, (q, cache, cache, lengths, 0.1)


def warmup_cases(workload: Workload) -> Iterator[WarmupCase]:
    """One token of each sequence; two and five, which the draft and the model of speculative decoding read at once."""
    if workload.stage != "decode":
        return
    batch, heads, size, dtype = workload.batch_size, workload.model.n_head, workload.head_size, workload.matmul_dtype
    cache = workload.tensor(batch, heads, workload.length, size, dtype=dtype)
    lengths = torch.full((batch,), workload.length, dtype=torch.int32, device=workload.device)
    for queries in (1, 2, 5):
        qkv = workload.tensor(batch, min(queries, workload.length), 3, heads, size, dtype=dtype)
        yield partial(decode_attention, qkv[:, :, 0].transpose(1, 2), cache, cache, lengths)
