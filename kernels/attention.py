"""Causal attention that never holds the score matrix: online softmax forward, recomputed probabilities backward.

The method is FlashAttention-2's (Dao 2023, arXiv:2307.08691). The backward is two kernels, one that owns keys and one
that owns queries, so that every gradient is summed in one place and in one order: no atomics, the same bits every run.

Scores are kept in units of log2: exp2 is what the hardware has, and scale * log2(e) costs one multiplication.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.tuning import Options, Tunable

_LOG2_E = 1.4426950408889634


@triton.jit
def _load_rows(ptr, rows, stride_row, n_rows, CHECK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Load ptr[rows, :D] as a tile [rows, BD], zero outside. CHECK unless all rows are known to be below n_rows."""
    cols = tl.arange(0, BD)
    p = ptr + rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    # a mask that is always true costs registers and wide loads
    if CHECK and D < BD:
        tile_rows = tl.load(p, mask=(rows < n_rows)[:, None] & (cols < D)[None, :], other=0.0)
    elif CHECK:
        tile_rows = tl.load(p, mask=(rows < n_rows)[:, None], other=0.0)
    elif D < BD:
        tile_rows = tl.load(p, mask=(cols < D)[None, :], other=0.0)
    else:
        tile_rows = tl.load(p)
    return tile_rows


@triton.jit
def _store_rows(ptr, rows, stride_row, n_rows, values, D: tl.constexpr, BD: tl.constexpr):
    cols = tl.arange(0, BD)
    mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _kept(seed, head, query, key, n_queries, n_keys, dropout_p):
    """Whether dropout keeps the probability of each (query, key): a pure function of seed and position."""
    element = (head.to(tl.int64) * n_queries + query) * n_keys + key
    return tl.rand(seed, element) >= dropout_p


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_ptr, v_ptr, queries, first_key, last_key,
    stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Fold the keys [first_key, last_key) into the running softmax of one tile of queries."""
    for start in range(first_key, last_key, BN):
        keys = start + tl.arange(0, BN)
        k = _load_rows(k_ptr, keys, stride_k_row, n_keys, MASKED, D, BD)  # [BN, BD]
        scores = tile.dot(q, tl.trans(k), tl.zeros([q.shape[0], BN], tl.float32), PRECISION) * scale_log2  # [BM, BN]
        if MASKED:
            seen = keys[None, :] <= queries[:, None] + (n_keys - n_queries)
            scores = tl.where(seen & (keys < n_keys)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        p = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
        if DROPOUT:
            kept = _kept(seed, head, queries.to(tl.int64)[:, None], keys[None, :], n_queries, n_keys, dropout_p)
            p = tl.where(kept, p / (1.0 - dropout_p), 0.0)
        v = _load_rows(v_ptr, keys, stride_v_row, n_keys, MASKED, D, BD)  # [BN, BD]
        acc = tile.dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_o_batch, stride_o_head, stride_o_row,
    n_heads, n_batch_heads, n_queries, n_keys, scale_log2, dropout_p,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # the longest rows of the triangle first, so that no long tile is left alone at the end
    head = tl.program_id(0) % n_batch_heads
    first_query = (tl.cdiv(n_queries, BM) - 1 - tl.program_id(0) // n_batch_heads) * BM
    batch, head_of_batch = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    q_ptr += batch * stride_q_batch + head_of_batch * stride_q_head
    k_ptr += batch * stride_k_batch + head_of_batch * stride_k_head
    v_ptr += batch * stride_v_batch + head_of_batch * stride_v_head
    o_ptr += batch * stride_o_batch + head_of_batch * stride_o_head
    seed = tl.load(seed_ptr) if DROPOUT else 0

    queries = first_query + tl.arange(0, BM)
    q = _load_rows(q_ptr, queries, stride_q_row, n_queries, True, D, BD)  # [BM, BD]
    acc = tl.zeros([BM, BD], dtype=tl.float32)
    row_sum = tl.zeros([BM], dtype=tl.float32)
    row_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    # keys up to here are seen by every query of the tile
    unmasked_end = (first_query + 1 + n_keys - n_queries) // BN * BN
    end = tl.minimum(first_query + BM + n_keys - n_queries, n_keys)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, queries, 0, unmasked_end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptr, v_ptr, queries, unmasked_end, end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    _store_rows(o_ptr, queries, stride_o_row, n_queries, acc / row_sum[:, None], D, BD)
    lse_offset = head.to(tl.int64) * n_queries + queries
    tl.store(lse_ptr + lse_offset, row_max + tl.log2(row_sum), mask=queries < n_queries)


@triton.jit
def _attention_delta_kernel(
    o_ptr, do_ptr, delta_ptr, stride_o_batch, stride_o_head, stride_o_row,
    stride_do_batch, stride_do_head, stride_do_row, n_heads, n_queries,
    BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write delta = rowsum(o * do), the part of the softmax gradient that is the same for all keys of a query."""
    tiles = tl.cdiv(n_queries, BM)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    queries = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    o_ptr += head // n_heads * stride_o_batch + head % n_heads * stride_o_head
    do_ptr += head // n_heads * stride_do_batch + head % n_heads * stride_do_head
    o = _load_rows(o_ptr, queries, stride_o_row, n_queries, True, D, BD).to(tl.float32)  # [BM, BD]
    do = _load_rows(do_ptr, queries, stride_do_row, n_queries, True, D, BD).to(tl.float32)
    tl.store(delta_ptr + head * n_queries + queries, tl.sum(o * do, axis=1), mask=queries < n_queries)


@triton.jit
def _accumulate_dk_dv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, keys, first_query, last_query,
    stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the queries [first_query, last_query) to the gradients of one tile of keys. Works on transposed scores."""
    for start in range(first_query, last_query, BM):
        queries = start + tl.arange(0, BM)
        q = _load_rows(q_ptr, queries, stride_q_row, n_queries, True, D, BD)  # [BM, BD]
        do = _load_rows(do_ptr, queries, stride_do_row, n_queries, True, D, BD)  # [BM, BD]
        # past the last query: exp2(score - inf) = 0
        lse = tl.load(lse_ptr + queries, mask=queries < n_queries, other=float("inf"))  # [BM]
        delta = tl.load(delta_ptr + queries, mask=queries < n_queries, other=0.0)
        zeros = tl.zeros([BN, BM], dtype=tl.float32)
        p = tl.exp2(tile.dot(k, tl.trans(q), zeros, PRECISION) * scale_log2 - lse[None, :])  # [BN, BM]
        if MASKED:
            seen = keys[:, None] <= queries[None, :] + (n_keys - n_queries)
            p = tl.where(seen, p, 0.0)
        dp = tile.dot(v, tl.trans(do), zeros, PRECISION)  # [BN, BM]
        p_dropped = p
        if DROPOUT:
            kept = _kept(seed, head, queries.to(tl.int64)[None, :], keys[:, None], n_queries, n_keys, dropout_p)
            p_dropped = tl.where(kept, p / (1.0 - dropout_p), 0.0)
            dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
        dv = tile.dot(p_dropped.to(do.dtype), do, dv, PRECISION)
        dk = tile.dot((p * (dp - delta[None, :])).to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit
def _attention_dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_do_batch, stride_do_head, stride_do_row,
    stride_dk_batch, stride_dk_head, stride_dk_row,
    n_heads, n_batch_heads, n_queries, n_keys, scale, scale_log2, dropout_p,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # the first keys are seen by most queries: the longest tiles come first
    head = tl.program_id(0) % n_batch_heads
    first_key = tl.program_id(0) // n_batch_heads * BN
    batch, head_of_batch = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    q_ptr += batch * stride_q_batch + head_of_batch * stride_q_head
    k_ptr += batch * stride_k_batch + head_of_batch * stride_k_head
    v_ptr += batch * stride_v_batch + head_of_batch * stride_v_head
    do_ptr += batch * stride_do_batch + head_of_batch * stride_do_head
    dk_ptr += batch * stride_dk_batch + head_of_batch * stride_dk_head
    dv_ptr += batch * stride_dk_batch + head_of_batch * stride_dk_head
    lse_ptr += head.to(tl.int64) * n_queries
    delta_ptr += head.to(tl.int64) * n_queries
    seed = tl.load(seed_ptr) if DROPOUT else 0

    keys = first_key + tl.arange(0, BN)
    k = _load_rows(k_ptr, keys, stride_k_row, n_keys, True, D, BD)  # [BN, BD]
    v = _load_rows(v_ptr, keys, stride_v_row, n_keys, True, D, BD)
    dk = tl.zeros([BN, BD], dtype=tl.float32)
    dv = tl.zeros([BN, BD], dtype=tl.float32)
    # queries before `diagonal` see none of these keys, those from `unmasked` on see all of them
    diagonal = tl.maximum(first_key - (n_keys - n_queries), 0) // BM * BM
    unmasked = tl.maximum(first_key + BN - 1 - (n_keys - n_queries), 0)
    unmasked = tl.minimum(tl.cdiv(unmasked, BM) * BM, n_queries)
    dk, dv = _accumulate_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, keys, diagonal, unmasked,
        stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, BM=BM, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    dk, dv = _accumulate_dk_dv(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, keys, unmasked, n_queries,
        stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, BM=BM, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    _store_rows(dk_ptr, keys, stride_dk_row, n_keys, dk * scale, D, BD)
    _store_rows(dv_ptr, keys, stride_dk_row, n_keys, dv, D, BD)


@triton.jit
def _accumulate_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr, queries, first_key, last_key,
    stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the keys [first_key, last_key) to the gradient of one tile of queries."""
    for start in range(first_key, last_key, BN):
        keys = start + tl.arange(0, BN)
        k = _load_rows(k_ptr, keys, stride_k_row, n_keys, MASKED, D, BD)  # [BN, BD]
        v = _load_rows(v_ptr, keys, stride_v_row, n_keys, MASKED, D, BD)  # [BN, BD]
        zeros = tl.zeros([q.shape[0], BN], dtype=tl.float32)
        p = tl.exp2(tile.dot(q, tl.trans(k), zeros, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        if MASKED:
            seen = keys[None, :] <= queries[:, None] + (n_keys - n_queries)
            p = tl.where(seen & (keys < n_keys)[None, :], p, 0.0)
        dp = tile.dot(do, tl.trans(v), zeros, PRECISION)  # [BM, BN]
        if DROPOUT:
            kept = _kept(seed, head, queries.to(tl.int64)[:, None], keys[None, :], n_queries, n_keys, dropout_p)
            dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
        dq = tile.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, PRECISION)
    return dq


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_do_batch, stride_do_head, stride_do_row,
    stride_dq_batch, stride_dq_head, stride_dq_row,
    n_heads, n_batch_heads, n_queries, n_keys, scale, scale_log2, dropout_p,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % n_batch_heads
    first_query = (tl.cdiv(n_queries, BM) - 1 - tl.program_id(0) // n_batch_heads) * BM
    batch, head_of_batch = (head // n_heads).to(tl.int64), (head % n_heads).to(tl.int64)
    q_ptr += batch * stride_q_batch + head_of_batch * stride_q_head
    k_ptr += batch * stride_k_batch + head_of_batch * stride_k_head
    v_ptr += batch * stride_v_batch + head_of_batch * stride_v_head
    do_ptr += batch * stride_do_batch + head_of_batch * stride_do_head
    dq_ptr += batch * stride_dq_batch + head_of_batch * stride_dq_head
    seed = tl.load(seed_ptr) if DROPOUT else 0

    queries = first_query + tl.arange(0, BM)
    q = _load_rows(q_ptr, queries, stride_q_row, n_queries, True, D, BD)  # [BM, BD]
    do = _load_rows(do_ptr, queries, stride_do_row, n_queries, True, D, BD)
    row = head.to(tl.int64) * n_queries + queries
    lse = tl.load(lse_ptr + row, mask=queries < n_queries, other=float("inf"))  # [BM]
    delta = tl.load(delta_ptr + row, mask=queries < n_queries, other=0.0)
    dq = tl.zeros([BM, BD], dtype=tl.float32)
    unmasked_end = (first_query + 1 + n_keys - n_queries) // BN * BN
    end = tl.minimum(first_query + BM + n_keys - n_queries, n_keys)
    dq = _accumulate_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, queries, 0, unmasked_end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, do, lse, delta, k_ptr, v_ptr, queries, unmasked_end, end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, head, dropout_p,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    _store_rows(dq_ptr, queries, stride_dq_row, n_queries, dq * scale, D, BD)


# (BM, BN, num_warps, num_stages) for head sizes up to 64, 128 and 256: blocks whose programs keep everything in
# registers and fit in shared memory on NVIDIA's chips of capability 8.0, 8.9, 9.0 and 12.0, with Triton 3.6, 3.7
# and 3.9. The random numbers of dropout take registers of their own.
_HALF = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    "dk_dv": ((32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)),
    "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
}
_HALF_DROPOUT = {
    "forward": ((128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    "dk_dv": ((16, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)),
    "dq": ((128, 32, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
}
_FLOAT32 = {
    "forward": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dk_dv": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dq": ((32, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_FLOAT32_DROPOUT = {
    "forward": ((32, 16, 8, 1), (16, 16, 4, 1), (16, 16, 8, 2)),
    "dk_dv": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    "dq": ((32, 16, 4, 1), (16, 16, 4, 1), (16, 16, 8, 2)),
}


def _tunable(pass_name: str) -> Tunable:
    """The blocks of the pass `forward`, `dk_dv` or `dq`, by padded head size, dtype and whether there is dropout."""

    def rule(architecture: str, head_size: int, dtype: torch.dtype, dropout: bool) -> Options:
        if dtype == torch.float32:
            blocks = _FLOAT32_DROPOUT if dropout else _FLOAT32
        else:
            blocks = _HALF_DROPOUT if dropout else _HALF
        block_m, block_n, warps, stages = blocks[pass_name][0 if head_size <= 64 else 1 if head_size == 128 else 2]
        return {"BM": block_m, "BN": block_n, "num_warps": warps, "num_stages": stages}

    return Tunable(f"attention_{pass_name}", rule)


_FORWARD, _DK_DV, _DQ = _tunable("forward"), _tunable("dk_dv"), _tunable("dq")


def _padded(head_size: int) -> int:
    return max(16, triton.next_power_of_2(head_size))


def _unit_stride(x: Tensor) -> Tensor:
    """Return x [B, H, T, D] with adjacent elements in its last dimension; a copy only where that is not so already."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _empty_like_heads(x: Tensor, rows: int) -> Tensor:
    """[B, H, rows, D] stored as [B, rows, H, D]: what the output projection reads without a copy."""
    batch, heads, _, head_size = x.shape
    return x.new_empty(batch, rows, heads, head_size).transpose(1, 2)


def _compute(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    batch, heads, n_queries, head_size = q.shape
    o = _empty_like_heads(q, n_queries)
    lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q.device)
    padded = _padded(head_size)

    def launch(options: Options) -> None:
        with runtime.on_device(q):
            _attention_forward_kernel[(runtime.cdiv(n_queries, options["BM"]) * batch * heads,)](
                q, k, v, o, lse, seed, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
                heads, batch * heads, n_queries, k.shape[2], scale * _LOG2_E, dropout_p,
                D=head_size, BD=padded, DROPOUT=seed is not None, PRECISION=runtime.dot_precision(q.dtype), **options,
            )  # fmt: skip

    if o.numel() > 0:
        _FORWARD.launch(launch, q.device, padded, q.dtype, seed is not None)
    return o, lse


_forward = torch.library.custom_op("gptfast::causal_attention", _compute, mutates_args=())


@_forward.register_fake
def _(q, k, v, scale, dropout_p, seed):
    return _empty_like_heads(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("gptfast::causal_attention_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v, do = _unit_stride(q), _unit_stride(k), _unit_stride(v), _unit_stride(do)
    batch, heads, n_queries, head_size = q.shape
    n_keys = k.shape[2]
    dq, dk, dv = _empty_like_heads(q, n_queries), _empty_like_heads(k, n_keys), _empty_like_heads(v, n_keys)
    if o.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    sizes = (heads, batch * heads, n_queries, n_keys, scale, scale * _LOG2_E, dropout_p)
    problem = (_padded(head_size), q.dtype, seed is not None)
    constants = {
        "D": head_size,
        "BD": problem[0],
        "DROPOUT": seed is not None,
        "PRECISION": runtime.dot_precision(q.dtype),
    }

    def launch_dk_dv(options: Options) -> None:
        with runtime.on_device(q):
            _attention_dk_dv_kernel[(runtime.cdiv(n_keys, options["BN"]) * batch * heads,)](
                q, k, v, do, lse, delta, dk, dv, seed, *inputs, *dk.stride()[:3], *sizes, **constants, **options,
            )  # fmt: skip

    def launch_dq(options: Options) -> None:
        with runtime.on_device(q):
            _attention_dq_kernel[(runtime.cdiv(n_queries, options["BM"]) * batch * heads,)](
                q, k, v, do, lse, delta, dq, seed, *inputs, *dq.stride()[:3], *sizes, **constants, **options,
            )  # fmt: skip

    delta_rows = max(16, 2048 // problem[0])
    with runtime.on_device(q):
        _attention_delta_kernel[(runtime.cdiv(n_queries, delta_rows) * batch * heads,)](
            o, do, delta, *o.stride()[:3], *do.stride()[:3], heads, n_queries,
            BM=delta_rows, D=head_size, BD=problem[0],
        )  # fmt: skip
    _DK_DV.launch(launch_dk_dv, q.device, *problem)
    _DQ.launch(launch_dq, q.device, *problem)
    return dq, dk, dv


@_backward.register_fake
def _(do, q, k, v, o, lse, scale, dropout_p, seed):
    return _empty_like_heads(q, q.shape[2]), _empty_like_heads(k, k.shape[2]), _empty_like_heads(v, v.shape[2])


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
    runtime.require_dtype("causal_attention", q)
    if q.shape[3] > runtime.MAX_HEAD_SIZE:
        raise ValueError(f"causal_attention: the head size D must be at most {runtime.MAX_HEAD_SIZE}, got {q.shape[3]}")
    dtype = runtime.autocast_dtype(q.device)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    seed = runtime.dropout_seed(dropout_p, seed, q.device)
    forward = _compute if runtime.unobserved(q, k, v) else _forward
    o, _ = forward(q, k, v, q.shape[3] ** -0.5 if scale is None else float(scale), float(dropout_p), seed)
    return o
