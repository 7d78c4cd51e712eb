"""Causal attention that never stores the score matrix: FlashAttention-2 (Dao 2023, arXiv:2307.08691).

The forward is an online softmax; the backward recomputes the probabilities from the log-sum-exp. The backward has two
kernels, one that owns keys and one that owns queries: every gradient is summed in one place and one order, without
atomics, and is bitwise reproducible.

Tiles: b_q [BM, BD] holds BM queries of one head, padded from D to BD columns; b_k and b_v [BN, BD] hold keys and
values; b_s, b_p and b_dp [BM, BN] are scores, probabilities and their gradients. m_i and l_i [BM] are the running
maximum and sum of the softmax, acc is its unnormalised output. Scores and lse are in units of log2, because exp2 is
the hardware's instruction. q, k, v, o and their gradients are pointers with strides, or descriptors if DESCRIPTORS.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, philox, reference, runtime, tile
from kernels.tma import has_tma, make_descriptor, supports_tma
from kernels.tuning import Config, Tunable
from kernels.workload import CodegenCase, WarmupCase, Workload


@triton.jit
def _load_rows(
    source, batch, head, first, stride_row, n_rows, CHECK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Load the rows from `first` on of one head as a tile [ROWS, BD], zero outside of [n_rows, D].

    `source` is a descriptor of all heads, or a pointer to the first row of this one. Pass CHECK=False only if all rows
    are below n_rows.
    """
    if DESCRIPTORS:
        return source.load([batch, head, first, 0]).reshape([ROWS, BD])
    else:
        rows, cols = first + tl.arange(0, ROWS), tl.arange(0, BD)
        p_rows = source + rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
        # a mask costs registers and wide loads, even if it is always true
        if CHECK and D < BD:
            return tl.load(p_rows, mask=(rows < n_rows)[:, None] & (cols < D)[None, :], other=0.0)
        elif CHECK:
            return tl.load(p_rows, mask=(rows < n_rows)[:, None], other=0.0)
        elif D < BD:
            return tl.load(p_rows, mask=(cols < D)[None, :], other=0.0)
        else:
            return tl.load(p_rows)


@triton.jit
def _store_rows(
    target, batch, head, first, stride_row, n_rows, b_x, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store a tile [ROWS, BD] to the rows from `first` on of one head; `target` is as in `_load_rows`."""
    if DESCRIPTORS:
        target.store([batch, head, first, 0], b_x.to(target.dtype).reshape([1, 1, ROWS, BD]))
    else:
        rows, cols = first + tl.arange(0, ROWS), tl.arange(0, BD)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
        tl.store(target + offsets, b_x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _head_base(source, batch, head, stride_batch, stride_head, DESCRIPTORS: tl.constexpr):
    """Return a pointer to the first row of one head. Descriptors address heads themselves."""
    if DESCRIPTORS:
        return source
    else:
        return source + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head


@triton.jit
def _attend(
    acc, l_i, m_i, b_q, k, v, batch, head, first_query, first_key, last_key,
    stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Update the online softmax of one tile of queries with the keys [first_key, last_key)."""
    queries = first_query + tl.arange(0, b_q.shape[0])
    for start in range(first_key, last_key, BN):
        keys = start + tl.arange(0, BN)
        b_k = _load_rows(k, batch, head, start, stride_k_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        b_qk = tile.dot(b_q, tl.trans(b_k), tl.zeros([b_q.shape[0], BN], tl.float32), PRECISION)  # [BM, BN]
        b_s = b_qk * scale_log2
        if MASKED:
            # a query below n_queries attends to no key past the last
            b_s = tl.where(keys[None, :] <= queries[:, None] + (n_keys - n_queries), b_s, float("-inf"))
            m_s = tl.max(b_s, axis=1)
        else:
            # the same maximum, as the scale is not negative; scaling then fuses with the subtraction of m_new
            m_s = tl.max(b_qk, axis=1) * scale_log2
        m_new = tl.maximum(m_i, m_s)
        b_p = tl.exp2(b_s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(b_p, axis=1)
        if DROPOUT:
            keep = philox.kept_scores(seed, batch_head, first_query, start, keep_threshold, b_q.shape[0], BN, False)
            b_p = tl.where(keep, b_p, 0.0)
        b_v = _load_rows(v, batch, head, start, stride_v_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        acc = tile.dot(b_p.to(b_v.dtype), b_v, acc * alpha[:, None], PRECISION)
        m_i = m_new
    return acc, l_i, m_i


@triton.jit
def _store_lse(lse_ptr, batch_head, queries, n_queries, m_i, l_i):
    """Store the log2-sum-exp2 of each query's scores."""
    p_lse = lse_ptr + batch_head.to(tl.int64) * n_queries + queries
    tl.store(p_lse, m_i + tl.log2(l_i), mask=queries < n_queries)


@triton.jit
def _attention_forward_kernel(
    q, k, v, o, lse_ptr, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_o_batch, stride_o_head, stride_o_row,
    n_heads, n_batch_heads, n_queries, n_keys, scale_log2, keep_threshold, dropout_scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Attend from one tile of queries of one head."""
    # long rows of the causal triangle first: short ones fill the GPU at the end
    batch_head = tl.program_id(0) % n_batch_heads
    first_query = (tl.cdiv(n_queries, BM) - 1 - tl.program_id(0) // n_batch_heads) * BM
    batch, head = batch_head // n_heads, batch_head % n_heads
    q = _head_base(q, batch, head, stride_q_batch, stride_q_head, DESCRIPTORS)
    k = _head_base(k, batch, head, stride_k_batch, stride_k_head, DESCRIPTORS)
    v = _head_base(v, batch, head, stride_v_batch, stride_v_head, DESCRIPTORS)
    o = _head_base(o, batch, head, stride_o_batch, stride_o_head, DESCRIPTORS)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    queries = first_query + tl.arange(0, BM)
    b_q = _load_rows(q, batch, head, first_query, stride_q_row, n_queries, True, DESCRIPTORS, BM, D, BD)  # [BM, BD]
    acc = tl.zeros([BM, BD], dtype=tl.float32)
    l_i = tl.zeros([BM], dtype=tl.float32)
    m_i = tl.full([BM], float("-inf"), dtype=tl.float32)
    # every query of the tile attends to all keys before unmasked_end
    unmasked_end = (first_query + 1 + n_keys - n_queries) // BN * BN
    end = tl.minimum(first_query + BM + n_keys - n_queries, n_keys)
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, b_q, k, v, batch, head, first_query, 0, unmasked_end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    acc, l_i, m_i = _attend(
        acc, l_i, m_i, b_q, k, v, batch, head, first_query, unmasked_end, end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    if DROPOUT:
        # the dropout scale applies to the output, not to the log-sum-exp
        _store_lse(lse_ptr, batch_head, queries, n_queries, m_i, l_i)
        l_i /= dropout_scale
    _store_rows(
        o, batch, head, first_query, stride_o_row, n_queries, acc / l_i[:, None], DESCRIPTORS, BM, D, BD
    )  # fmt: skip
    if not DROPOUT:  # stored last: earlier it spills
        _store_lse(lse_ptr, batch_head, queries, n_queries, m_i, l_i)


@triton.jit
def _attention_delta_kernel(
    o_ptr, do_ptr, lse_ptr, padded_lse_ptr, delta_ptr, stride_o_batch, stride_o_head, stride_o_row,
    stride_do_batch, stride_do_head, stride_do_row, n_heads, n_queries, n_padded,
    BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store delta = rowsum(o * do), the term of the softmax gradient that all keys of a query share.

    delta and a copy of lse have rows of n_padded queries. Queries past the last get the probability 0, so that the
    backward reads whole tiles without a mask.
    """
    tiles = tl.cdiv(n_padded, BM)
    batch_head = tl.program_id(0) // tiles
    first_query = tl.program_id(0) % tiles * BM
    batch, head = batch_head // n_heads, batch_head % n_heads
    o_ptr = _head_base(o_ptr, batch, head, stride_o_batch, stride_o_head, False)
    do_ptr = _head_base(do_ptr, batch, head, stride_do_batch, stride_do_head, False)
    b_o = _load_rows(o_ptr, batch, head, first_query, stride_o_row, n_queries, True, False, BM, D, BD)  # [BM, BD]
    b_do = _load_rows(do_ptr, batch, head, first_query, stride_do_row, n_queries, True, False, BM, D, BD)
    queries = first_query + tl.arange(0, BM)
    row = batch_head.to(tl.int64) * n_padded + queries
    tl.store(delta_ptr + row, tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), axis=1))
    p_lse = lse_ptr + batch_head.to(tl.int64) * n_queries + queries
    # exp2(score - inf) = 0
    tl.store(padded_lse_ptr + row, tl.load(p_lse, mask=queries < n_queries, other=float("inf")))


@triton.jit
def _accumulate_dk_dv(
    b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, batch, head, first_key, first_query, last_query,
    stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold, dropout_scale,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the gradients from the queries [first_query, last_query) to one tile of keys, with transposed scores."""
    keys = first_key + tl.arange(0, BN)
    for start in range(first_query, last_query, BM):
        queries = start + tl.arange(0, BM)
        b_q = _load_rows(q, batch, head, start, stride_q_row, n_queries, True, DESCRIPTORS, BM, D, BD)  # [BM, BD]
        b_do = _load_rows(do, batch, head, start, stride_do_row, n_queries, True, DESCRIPTORS, BM, D, BD)  # [BM, BD]
        lse = tl.load(lse_ptr + queries)  # [BM]
        delta = tl.load(delta_ptr + queries)  # [BM]
        zeros = tl.zeros([BN, BM], dtype=tl.float32)
        b_p = tl.exp2(tile.dot(b_k, tl.trans(b_q), zeros, PRECISION) * scale_log2 - lse[None, :])  # [BN, BM]
        if MASKED:
            b_p = tl.where(keys[:, None] <= queries[None, :] + (n_keys - n_queries), b_p, 0.0)
        b_dp = tile.dot(b_v, tl.trans(b_do), zeros, PRECISION)  # [BN, BM]
        b_p_dropped = b_p
        if DROPOUT:
            keep = philox.kept_scores(seed, batch_head, start, first_key, keep_threshold, BM, BN, True)  # [BN, BM]
            b_p_dropped = tl.where(keep, b_p, 0.0)
            b_dp = tl.where(keep, b_dp, 0.0) * dropout_scale
        b_dv = tile.dot(b_p_dropped.to(b_do.dtype), b_do, b_dv, PRECISION)
        b_dk = tile.dot((b_p * (b_dp - delta[None, :])).to(b_q.dtype), b_q, b_dk, PRECISION)
    return b_dk, b_dv


@triton.jit
def _attention_dk_dv_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_do_batch, stride_do_head, stride_do_row,
    stride_dk_batch, stride_dk_head, stride_dk_row,
    n_heads, n_batch_heads, n_queries, n_keys, n_padded, scale, scale_log2, keep_threshold, dropout_scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile of keys and values of one head."""
    # most queries attend to the first keys: their long tiles start first
    batch_head = tl.program_id(0) % n_batch_heads
    first_key = tl.program_id(0) // n_batch_heads * BN
    batch, head = batch_head // n_heads, batch_head % n_heads
    q = _head_base(q, batch, head, stride_q_batch, stride_q_head, DESCRIPTORS)
    k = _head_base(k, batch, head, stride_k_batch, stride_k_head, DESCRIPTORS)
    v = _head_base(v, batch, head, stride_v_batch, stride_v_head, DESCRIPTORS)
    do = _head_base(do, batch, head, stride_do_batch, stride_do_head, DESCRIPTORS)
    dk = _head_base(dk, batch, head, stride_dk_batch, stride_dk_head, DESCRIPTORS)
    dv = _head_base(dv, batch, head, stride_dk_batch, stride_dk_head, DESCRIPTORS)  # the strides of dk
    lse_ptr += batch_head.to(tl.int64) * n_padded
    delta_ptr += batch_head.to(tl.int64) * n_padded
    seed = tl.load(seed_ptr) if DROPOUT else 0

    b_k = _load_rows(k, batch, head, first_key, stride_k_row, n_keys, True, DESCRIPTORS, BN, D, BD)  # [BN, BD]
    b_v = _load_rows(v, batch, head, first_key, stride_v_row, n_keys, True, DESCRIPTORS, BN, D, BD)  # [BN, BD]
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BD], dtype=tl.float32)
    # queries before `diagonal` attend to none of these keys, queries from `unmasked` on to all of them
    diagonal = tl.maximum(first_key - (n_keys - n_queries), 0) // BM * BM
    unmasked = tl.maximum(first_key + BN - 1 - (n_keys - n_queries), 0)
    unmasked = tl.minimum(tl.cdiv(unmasked, BM) * BM, n_queries)
    b_dk, b_dv = _accumulate_dk_dv(
        b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, batch, head, first_key, diagonal, unmasked,
        stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold, dropout_scale,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BM=BM, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    b_dk, b_dv = _accumulate_dk_dv(
        b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, batch, head, first_key, unmasked, n_queries,
        stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold, dropout_scale,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BM=BM, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    _store_rows(dk, batch, head, first_key, stride_dk_row, n_keys, b_dk * scale, DESCRIPTORS, BN, D, BD)
    if DROPOUT:
        b_dv *= dropout_scale
    _store_rows(dv, batch, head, first_key, stride_dk_row, n_keys, b_dv, DESCRIPTORS, BN, D, BD)


@triton.jit
def _accumulate_dq(
    b_dq, b_q, b_do, lse, delta, k, v, batch, head, first_query, first_key, last_key,
    stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold, dropout_scale,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the gradient from the keys [first_key, last_key) to one tile of queries."""
    queries = first_query + tl.arange(0, b_q.shape[0])
    for start in range(first_key, last_key, BN):
        keys = start + tl.arange(0, BN)
        b_k = _load_rows(k, batch, head, start, stride_k_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        b_v = _load_rows(v, batch, head, start, stride_v_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        zeros = tl.zeros([b_q.shape[0], BN], dtype=tl.float32)
        b_p = tl.exp2(tile.dot(b_q, tl.trans(b_k), zeros, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        if MASKED:
            b_p = tl.where(keys[None, :] <= queries[:, None] + (n_keys - n_queries), b_p, 0.0)
        b_dp = tile.dot(b_do, tl.trans(b_v), zeros, PRECISION)  # [BM, BN]
        if DROPOUT:
            keep = philox.kept_scores(seed, batch_head, first_query, start, keep_threshold, b_q.shape[0], BN, False)
            b_dp = tl.where(keep, b_dp, 0.0) * dropout_scale
        b_dq = tile.dot((b_p * (b_dp - delta[:, None])).to(b_k.dtype), b_k, b_dq, PRECISION)
    return b_dq


@triton.jit
def _attention_dq_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dq, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_do_batch, stride_do_head, stride_do_row,
    stride_dq_batch, stride_dq_head, stride_dq_row,
    n_heads, n_batch_heads, n_queries, n_keys, n_padded, scale, scale_log2, keep_threshold, dropout_scale,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one tile of queries of one head."""
    batch_head = tl.program_id(0) % n_batch_heads
    first_query = (tl.cdiv(n_queries, BM) - 1 - tl.program_id(0) // n_batch_heads) * BM
    batch, head = batch_head // n_heads, batch_head % n_heads
    q = _head_base(q, batch, head, stride_q_batch, stride_q_head, DESCRIPTORS)
    k = _head_base(k, batch, head, stride_k_batch, stride_k_head, DESCRIPTORS)
    v = _head_base(v, batch, head, stride_v_batch, stride_v_head, DESCRIPTORS)
    do = _head_base(do, batch, head, stride_do_batch, stride_do_head, DESCRIPTORS)
    dq = _head_base(dq, batch, head, stride_dq_batch, stride_dq_head, DESCRIPTORS)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    queries = first_query + tl.arange(0, BM)
    b_q = _load_rows(q, batch, head, first_query, stride_q_row, n_queries, True, DESCRIPTORS, BM, D, BD)  # [BM, BD]
    b_do = _load_rows(do, batch, head, first_query, stride_do_row, n_queries, True, DESCRIPTORS, BM, D, BD)
    row = batch_head.to(tl.int64) * n_padded + queries
    lse = tl.load(lse_ptr + row)  # [BM]
    delta = tl.load(delta_ptr + row)  # [BM]
    b_dq = tl.zeros([BM, BD], dtype=tl.float32)
    unmasked_end = (first_query + 1 + n_keys - n_queries) // BN * BN
    end = tl.minimum(first_query + BM + n_keys - n_queries, n_keys)
    b_dq = _accumulate_dq(
        b_dq, b_q, b_do, lse, delta, k, v, batch, head, first_query, 0, unmasked_end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold, dropout_scale,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    b_dq = _accumulate_dq(
        b_dq, b_q, b_do, lse, delta, k, v, batch, head, first_query, unmasked_end, end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, keep_threshold, dropout_scale,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    _store_rows(dq, batch, head, first_query, stride_dq_row, n_queries, b_dq * scale, DESCRIPTORS, BM, D, BD)


Blocks = tuple[int, int, int, int]  # BM, BN, num_warps, num_stages
# the backward pads lse and delta to a multiple of this; every BM divides it
_PADDED_QUERIES = 128

# Blocks by pass, for head sizes up to 64, 128 and 256. All keep to registers and shared memory with Triton 3.6, 3.7 and
# 3.9. Dropout needs registers for random numbers.
_POINTERS_HALF: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    "dk_dv": ((32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)),
    "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
}
_FLOAT32: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dk_dv": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dq": ((32, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_FLOAT32_DROPOUT: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dk_dv": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
    "dq": ((32, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 2)),
}
# AMD: warps of 64 threads, 64 KiB of shared memory, no asynchronous copies
_AMD_HALF: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
    "dk_dv": ((32, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1)),
    "dq": ((64, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
}
_AMD_FLOAT32: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    "dk_dv": ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
    "dq": ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
}
# With TMA, the default first; without any, the blocks for pointers are used. A loop requests the next tile when it is
# done with one, so three stages are needed for it to arrive in time. 64 rows are one warp group of four warps: eight
# warps would read the other operand twice.
_TMA: dict[str, tuple[tuple[Blocks, ...], ...]] = {
    "forward": (
        ((128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 3)),
        ((128, 64, 8, 3), (128, 32, 8, 3), (128, 128, 8, 3)),
        ((128, 32, 8, 2),),
    ),
    "dk_dv": (((64, 64, 4, 3), (64, 128, 8, 3), (32, 64, 4, 3)), ((32, 64, 4, 3), (32, 128, 8, 3)), ()),
    "dq": (((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)), ((128, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)), ()),
}
_TMA_DROPOUT: dict[str, tuple[tuple[Blocks, ...], ...]] = {
    "forward": (
        ((128, 64, 8, 3), (64, 64, 4, 3)),
        ((64, 32, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3)),
        ((128, 32, 8, 2),),
    ),
    "dk_dv": (((64, 64, 4, 3), (32, 64, 4, 3)), ((32, 64, 4, 3), (16, 64, 4, 3)), ()),
    "dq": (((64, 64, 4, 3),), ((64, 32, 4, 3), (128, 64, 8, 3)), ()),
}


def _configs(
    pass_name: str, architecture: str, head_size: int, keys: int, dtype: torch.dtype, dropout: bool, tma: bool
) -> list[Config]:
    """Return the configurations of the pass `forward`, `dk_dv` or `dq`, the likeliest first."""
    size = 0 if head_size <= 64 else 1 if head_size == 128 else 2
    tma_blocks: tuple[Blocks, ...] = ()
    if tma and has_tma(architecture):
        tma_blocks = (_TMA_DROPOUT if dropout else _TMA)[pass_name][size]
        if architecture.startswith("sm_12"):  # matmuls read their operands from registers there
            tma_blocks = tma_blocks[:1] if pass_name == "forward" and size + dropout <= 1 else ()
    if architecture.startswith("gfx"):
        pointers = _AMD_FLOAT32 if dtype == torch.float32 else _AMD_HALF
    elif dtype == torch.float32:
        pointers = _FLOAT32_DROPOUT if dropout else _FLOAT32
    else:
        pointers = _POINTERS_HALF
    names = ("DESCRIPTORS", "BM", "BN", "num_warps", "num_stages")
    choices = [(True, *blocks) for blocks in tma_blocks] + [(False, *pointers[pass_name][size])]
    return [dict(zip(names, choice, strict=True)) for choice in choices]


_FORWARD, _DK_DV, _DQ = (Tunable(f"attention_{name}", partial(_configs, name)) for name in ("forward", "dk_dv", "dq"))


def _key(q: Tensor, k: Tensor, seed: Tensor | None, tma: bool) -> tuple[Any, ...]:
    """Return what the choice depends on: padded head size, keys up to a power of two, dtype, dropout, TMA."""
    width, keys = runtime.padded_head_size(q.shape[3]), runtime.next_power_of_2(k.shape[2])
    return width, keys, q.dtype, seed is not None, tma


def _constants(q: Tensor, seed: Tensor | None, config: Config) -> Config:
    return {
        "D": q.shape[3],
        "BD": runtime.padded_head_size(q.shape[3]),
        "DROPOUT": seed is not None,
        "PRECISION": runtime.dot_precision(q.dtype),
        **config,
    }


def _operands(config: Config, head_size: int, *tensors: tuple[Tensor, str]) -> list[Any]:
    """Return the tensors [B, H, rows, D], or their descriptors; each comes with the size of its tiles, BM or BN."""
    if not config["DESCRIPTORS"]:
        return [tensor for tensor, _ in tensors]
    width = runtime.padded_head_size(head_size)
    return [make_descriptor(tensor, 1, 1, config[rows], width) for tensor, rows in tensors]


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Write o [B, H, T, D]. Return the log2-sum-exp2 of each query's scores, [B, H, T] in float32."""
    batch, heads, n_queries, head_size = q.shape
    lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return lse
    if scale < 0.0:  # the kernel scales the maximum of products
        q, scale = -q, -scale
    strides = [stride for tensor in (q, k, v, o) for stride in tensor.stride()[:3]]

    def launch(config: Config) -> None:
        operands = _operands(config, head_size, (q, "BM"), (k, "BN"), (v, "BN"), (o, "BM"))
        with runtime.on_device(q):
            _attention_forward_kernel[(runtime.cdiv(n_queries, config["BM"]) * batch * heads,)](
                *operands, lse, seed, *strides,
                heads, batch * heads, n_queries, k.shape[2], scale * runtime.LOG2_E,
                *philox.dropout_constants(dropout_p),
                **_constants(q, seed, config),
            )  # fmt: skip

    _FORWARD.launch(launch, q.device, *_key(q, k, seed, supports_tma(q, k, v, o)))
    return lse


def _launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    """Write dq [B, H, T, D], and dk and dv [B, H, S, D], which have the same strides."""
    batch, heads, n_queries, head_size = q.shape
    n_keys = k.shape[2]
    if o.numel() == 0:
        dk.zero_()
        dv.zero_()
        return
    n_padded = runtime.cdiv(n_queries, _PADDED_QUERIES) * _PADDED_QUERIES
    padded_lse, delta = torch.empty(2, batch, heads, n_padded, dtype=torch.float32, device=q.device)
    strides = [stride for tensor in (q, k, v, do) for stride in tensor.stride()[:3]]
    sizes = (heads, batch * heads, n_queries, n_keys, n_padded)
    factors = (scale, scale * runtime.LOG2_E, *philox.dropout_constants(dropout_p))
    rows = max(16, 2048 // runtime.padded_head_size(head_size))
    with runtime.on_device(q):
        _attention_delta_kernel[(n_padded // rows * batch * heads,)](
            o, do, lse, padded_lse, delta, *o.stride()[:3], *do.stride()[:3], heads, n_queries, n_padded,
            BM=rows, D=head_size, BD=runtime.padded_head_size(head_size),
        )  # fmt: skip

    def launch_dk_dv(config: Config) -> None:
        *inputs, dk_out, dv_out = _operands(
            config, head_size, (q, "BM"), (k, "BN"), (v, "BN"), (do, "BM"), (dk, "BN"), (dv, "BN")
        )
        with runtime.on_device(q):
            _attention_dk_dv_kernel[(runtime.cdiv(n_keys, config["BN"]) * batch * heads,)](
                *inputs, padded_lse, delta, dk_out, dv_out, seed, *strides, *dk.stride()[:3], *sizes, *factors,
                **_constants(q, seed, config),
            )  # fmt: skip

    def launch_dq(config: Config) -> None:
        *inputs, dq_out = _operands(config, head_size, (q, "BM"), (k, "BN"), (v, "BN"), (do, "BM"), (dq, "BM"))
        with runtime.on_device(q):
            _attention_dq_kernel[(runtime.cdiv(n_queries, config["BM"]) * batch * heads,)](
                *inputs, padded_lse, delta, dq_out, seed, *strides, *dq.stride()[:3], *sizes, *factors,
                **_constants(q, seed, config),
            )  # fmt: skip

    tma = supports_tma(q, k, v, do)
    _DK_DV.launch(launch_dk_dv, q.device, *_key(q, k, seed, tma and supports_tma(dk, dv)))
    _DQ.launch(launch_dq, q.device, *_key(q, k, seed, tma and supports_tma(dq)))


def _empty_like_heads(x: Tensor) -> Tensor:
    """Return an empty [B, H, T, D] stored as [B, T, H, D]: the output projection reads it without a copy."""
    batch, heads, length, head_size = x.shape
    return x.new_empty(batch, length, heads, head_size).transpose(1, 2)


def _compute(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    o = _empty_like_heads(q)
    q, k, v = runtime.unit_stride(q), runtime.unit_stride(k), runtime.unit_stride(v)
    return o, _launch_forward(q, k, v, o, scale, dropout_p, seed)


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
    _launch_backward(*inputs, o, lse, *gradients, scale, dropout_p, seed)
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
    """Two matmuls with the full score matrix, without causality, as PyTorch's formula counts."""
    return 4 * q_shape.numel() * k_shape[2]


@register_flop_formula(torch.ops.gptfast.causal_attention_backward)
def _backward_flops(do_shape, q_shape, k_shape, *args, **kwargs) -> int:
    """Five matmuls: the recomputed scores, dP, dV, dK and dQ, as PyTorch's formula counts."""
    return 10 * q_shape.numel() * k_shape[2]


def _heads_of(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v [B, H, T, D] as views of [B, T, 3, H, D]."""
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    return q, k, v


def _packed_compute(qkv: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_of(runtime.unit_stride(qkv))
    o = _empty_like_heads(q)
    lse = _launch_forward(q, k, v, o, scale, dropout_p, seed)
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
    """Return one gradient [B, T, 3, H, D], without a split or a concatenation."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _launch_backward(
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
    """Count as `_forward_flops`: the score matrix is [T, T] for each of the B * H heads."""
    return 4 * qkv_shape.numel() // 3 * qkv_shape[1]


@register_flop_formula(torch.ops.gptfast.causal_attention_qkvpacked_backward)
def _packed_backward_flops(do_shape, qkv_shape, *args, **kwargs) -> int:
    return 10 * qkv_shape.numel() // 3 * qkv_shape[1]


@reference.document_arguments
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute softmax(scale * q @ k.T + causal mask) @ v, with the mask aligned to the end.

    Query i attends to the keys j <= i + S - T. The method is FlashAttention-2 (Dao 2023, arXiv:2307.08691), with memory
    that grows with T, not T * S. The head size D is at most 256. Inputs are read by their strides, and the result is
    stored as [B, T, H, D]: `o.transpose(1, 2)` is contiguous. float32 inputs follow
    `torch.get_float32_matmul_precision()`. A second derivative raises RuntimeError.
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


@reference.document_arguments
def causal_attention_qkvpacked(
    qkv: Tensor, scale: float | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None
) -> Tensor:
    """Compute causal attention of packed queries, keys and values, as one projection writes them.

    The result is bitwise that of `causal_attention`. The backward writes one gradient of qkv, which saves the copy that
    joins three. The head size D is at most 256. A second derivative raises RuntimeError.
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
