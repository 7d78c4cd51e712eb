"""Attention of the last tokens of sequences over KV caches, for generation.

Reading the cache takes the time. It is split over keys as well as heads, so that a few sequences fill the GPU. Each
part has its own softmax, and a second kernel merges the parts (Dao et al. 2023, "Flash-Decoding"). The shapes decide
the number of parts, and the lengths decide on the device how long each is: the host never synchronises. Each query has
its own programs; those of one head run side by side and share its keys through the L2 cache.

Tiles: b_q [BD] is one query, padded from D to BD; b_k and b_v [BN, BD] hold keys and values, b_s and b_p [BN] their
scores and probabilities. m_i is the running maximum, l_i the running sum, kept per lane, and acc [BD] the unnormalised
output. Scores and lse are in units of log2.
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
    """Attend from one query to one part of the keys, and store the output and its log2-sum-exp2."""
    row, part = tl.program_id(0), tl.program_id(1)
    batch_head, query = row // n_queries, row % n_queries
    batch, head = (batch_head // n_heads).to(tl.int64), (batch_head % n_heads).to(tl.int64)
    # a length beyond the cache would read out of bounds
    length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), n_keys)
    length = tl.maximum(length - (n_queries - 1 - query), 0)
    rows = tl.cdiv(tl.cdiv(length, PARTS), BN) * BN
    first, last = part * rows, tl.minimum((part + 1) * rows, length)
    cols = tl.arange(0, BD)
    q_ptr += batch * stride_q_batch + head * stride_q_head + query.to(tl.int64) * stride_q_row
    b_q = tl.load(q_ptr + cols, mask=cols < D, other=0.0)  # [BD]
    b_q = b_q.to(tl.float32) * scale_log2
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    acc = tl.zeros([BD], dtype=tl.float32)
    l_i = tl.zeros([BN], dtype=tl.float32)
    m_i = tl.full([1], float("-inf"), dtype=tl.float32)
    for start in range(first, last, BN):
        keys = start + tl.arange(0, BN)
        mask = (keys < last)[:, None] & (cols < D)[None, :]
        p_k = k_ptr + keys.to(tl.int64)[:, None] * stride_k_row + cols[None, :]
        b_k = tl.load(p_k, mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
        b_s = tl.where(keys < last, tl.sum(b_k * b_q[None, :], axis=1), float("-inf"))  # [BN]
        m_new = tl.maximum(m_i, tl.max(b_s, axis=0))
        alpha = tl.exp2(m_i - m_new)
        b_p = tl.exp2(b_s - m_new)
        p_v = v_ptr + keys.to(tl.int64)[:, None] * stride_v_row + cols[None, :]
        b_v = tl.load(p_v, mask=mask, other=0.0).to(tl.float32)  # [BN, BD]
        acc = acc * alpha + tl.sum(b_p[:, None] * b_v, axis=0)
        l_i = l_i * alpha + b_p
        m_i = m_new
    sum_p = tl.sum(l_i, axis=0)
    # a part without keys has weight 0 and value 0
    sum_p = tl.where(sum_p > 0.0, sum_p, 1.0)
    acc = acc / sum_p
    if PARTS == 1:
        tl.store(o_ptr + row.to(tl.int64) * D + cols, acc.to(o_ptr.dtype.element_ty), mask=cols < D)
    else:
        slot = row.to(tl.int64) * PARTS + part
        tl.store(part_o_ptr + slot * D + cols, acc, mask=cols < D)
        tl.store(part_lse_ptr + slot + tl.arange(0, 1), m_i + tl.log2(sum_p))


@triton.jit
def _decode_merge_kernel(
    part_o_ptr, part_lse_ptr, o_ptr, PARTS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Merge the parts of one query, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    slots = row * PARTS + tl.arange(0, PARTS)
    cols = tl.arange(0, BD)
    lse = tl.load(part_lse_ptr + slots)  # [PARTS]
    m_i = tl.max(lse, axis=0)
    # without any key all are -inf, and -inf - -inf is NaN
    weight = tl.exp2(lse - tl.where(m_i == float("-inf"), 0.0, m_i))
    l_i = tl.sum(weight, axis=0)
    p_o = part_o_ptr + slots[:, None] * D + cols[None, :]
    b_o = tl.load(p_o, mask=(cols < D)[None, :], other=0.0)  # [PARTS, BD]
    o = tl.sum(b_o * weight[:, None], axis=0) / tl.where(l_i > 0.0, l_i, 1.0)
    tl.store(o_ptr + row * D + cols, o.to(o_ptr.dtype.element_ty), mask=cols < D)


def _config(head_size: int, elements: int, warps: int) -> Config:
    """Return a tile of about `elements` numbers of keys.

    `per_processor` is the number of programs on each multiprocessor. A part has at least `shortest` keys: below that,
    merging costs more than splitting saves.
    """
    keys = max(16, min(256, elements // head_size))
    warps = max(warps, 8) if head_size > 128 else warps
    return {"BN": keys, "num_warps": warps, "per_processor": 4, "shortest": max(keys, 128)}


def _configs(architecture: str, head_size: int, keys: int, heads: int, dtype: torch.dtype) -> list[Config]:
    # in float32, 4096 numbers in four warps spill
    sizes = ((2048, 4), (8192, 8)) if dtype == torch.float32 else ((4096, 4), (8192, 8), (2048, 4))
    return [_config(head_size, elements, warps) for elements, warps in sizes]


_PART = Tunable("decode", _configs)
_MAX_PARTS = 64


def _parts(rows: int, n_keys: int, device: torch.device, config: Config) -> int:
    """Return the number of parts that the keys are split into: a power of two, from the shapes alone."""
    programs = runtime.program_count(device, config["per_processor"])
    parts = min(runtime.cdiv(programs, rows), runtime.cdiv(n_keys, config["shortest"]), _MAX_PARTS)
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

    def launch(config: Config) -> None:
        parts = _parts(rows, n_keys, q.device, config)
        slots = rows * parts if parts > 1 else 0
        part_o = torch.empty(slots, head_size, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(slots, dtype=torch.float32, device=q.device)
        with runtime.on_device(q):
            _decode_part_kernel[(rows, parts)](
                q, k_cache, v_cache, lengths, o, part_o, part_lse, *q.stride()[:3],
                *k_cache.stride()[:3], *v_cache.stride()[:3], heads, n_queries, n_keys, scale * runtime.LOG2_E,
                PARTS=parts, D=head_size, BD=width, BN=config["BN"], num_warps=config["num_warps"],
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
    """Two matmuls with the whole cache: shapes do not tell the lengths."""
    return 4 * q_shape.numel() * k_shape[2]


@reference.document_arguments
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """Compute softmax(scale * q @ k.T) @ v of each sequence's last T tokens over the first `lengths` keys of its cache.

    For generation: T is usually 1, the head size D is at most 256, and a derivative raises RuntimeError. The keys are
    split (Dao et al. 2023, "Flash-Decoding"). The host never reads the lengths: CUDA graphs may replay the call while
    they grow. The result is contiguous.
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
