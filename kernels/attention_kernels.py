"""Device code of causal attention.

Scores are kept in units of log2: exp2 is what the hardware has, and scale * log2(e) costs one multiplication.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import philox, tile


@triton.jit
def _load_rows(
    source, batch, head, first, stride_row, n_rows, CHECK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The rows from `first` on of one head as a tile [ROWS, BD], zero outside of [n_rows, D].

    `source` is a descriptor of all heads, or a pointer to the first row of this one. CHECK unless all rows are known
    to be below n_rows.
    """
    if DESCRIPTORS:
        return source.load([batch, head, first, 0]).reshape([ROWS, BD])
    else:
        rows, cols = first + tl.arange(0, ROWS), tl.arange(0, BD)
        p = source + rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
        # a mask that is always true costs registers and wide loads
        if CHECK and D < BD:
            return tl.load(p, mask=(rows < n_rows)[:, None] & (cols < D)[None, :], other=0.0)
        elif CHECK:
            return tl.load(p, mask=(rows < n_rows)[:, None], other=0.0)
        elif D < BD:
            return tl.load(p, mask=(cols < D)[None, :], other=0.0)
        else:
            return tl.load(p)


@triton.jit
def _store_rows(
    target, batch, head, first, stride_row, n_rows, values, DESCRIPTORS: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write a tile [ROWS, BD] to the rows from `first` on of one head, told as in `_load_rows`."""
    if DESCRIPTORS:
        target.store([batch, head, first, 0], values.to(target.dtype).reshape([1, 1, ROWS, BD]))
    else:
        rows, cols = first + tl.arange(0, ROWS), tl.arange(0, BD)
        mask = (rows < n_rows)[:, None] & (cols < D)[None, :]
        offsets = rows.to(tl.int64)[:, None] * stride_row + cols[None, :]
        tl.store(target + offsets, values.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _of_head(source, batch, head, stride_batch, stride_head, DESCRIPTORS: tl.constexpr):
    """A pointer to the first row of one head; descriptors are left as they are."""
    if DESCRIPTORS:
        return source
    else:
        return source + batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_source, v_source, batch, head, first_query, first_key, last_key,
    stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Fold the keys [first_key, last_key) into the running softmax of one tile of queries."""
    queries = first_query + tl.arange(0, q.shape[0])
    for start in range(first_key, last_key, BN):
        keys = start + tl.arange(0, BN)
        k = _load_rows(k_source, batch, head, start, stride_k_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        products = tile.dot(q, tl.trans(k), tl.zeros([q.shape[0], BN], tl.float32), PRECISION)  # [BM, BN]
        scores = products * scale_log2
        if MASKED:
            # a query below n_queries sees no key past the last
            seen = keys[None, :] <= queries[:, None] + (n_keys - n_queries)
            scores = tl.where(seen, scores, float("-inf"))
            highest = tl.max(scores, axis=1)
        else:
            # the same number, as the scale is not negative; scores are then one instruction, with the difference below
            highest = tl.max(products, axis=1) * scale_log2
        new_max = tl.maximum(row_max, highest)
        p = tl.exp2(scores - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
        if DROPOUT:
            kept = philox.kept_scores(seed, batch_head, first_query, start, threshold, q.shape[0], BN, False)
            p = tl.where(kept, p, 0.0)
        v = _load_rows(v_source, batch, head, start, stride_v_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        acc = tile.dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _store_lse(lse_ptr, batch_head, queries, n_queries, row_max, row_sum):
    """Write the log2-sum-exp2 of each query's scores."""
    p_lse = lse_ptr + batch_head.to(tl.int64) * n_queries + queries
    tl.store(p_lse, row_max + tl.log2(row_sum), mask=queries < n_queries)


@triton.jit
def _attention_forward_kernel(
    q, k, v, o, lse_ptr, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_o_batch, stride_o_head, stride_o_row,
    n_heads, n_batch_heads, n_queries, n_keys, scale_log2, threshold, grow,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # the longest rows of the triangle first, so that no long tile is left alone at the end
    batch_head = tl.program_id(0) % n_batch_heads
    first_query = (tl.cdiv(n_queries, BM) - 1 - tl.program_id(0) // n_batch_heads) * BM
    batch, head = batch_head // n_heads, batch_head % n_heads
    q = _of_head(q, batch, head, stride_q_batch, stride_q_head, DESCRIPTORS)
    k = _of_head(k, batch, head, stride_k_batch, stride_k_head, DESCRIPTORS)
    v = _of_head(v, batch, head, stride_v_batch, stride_v_head, DESCRIPTORS)
    o = _of_head(o, batch, head, stride_o_batch, stride_o_head, DESCRIPTORS)
    seed = tl.load(seed_ptr) if DROPOUT else 0

    queries = first_query + tl.arange(0, BM)
    b_q = _load_rows(q, batch, head, first_query, stride_q_row, n_queries, True, DESCRIPTORS, BM, D, BD)  # [BM, BD]
    acc = tl.zeros([BM, BD], dtype=tl.float32)
    row_sum = tl.zeros([BM], dtype=tl.float32)
    row_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    # keys up to here are seen by every query of the tile
    unmasked_end = (first_query + 1 + n_keys - n_queries) // BN * BN
    end = tl.minimum(first_query + BM + n_keys - n_queries, n_keys)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, b_q, k, v, batch, head, first_query, 0, unmasked_end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, b_q, k, v, batch, head, first_query, unmasked_end, end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    if DROPOUT:
        # what was kept grows, and the log-sum-exp does not
        _store_lse(lse_ptr, batch_head, queries, n_queries, row_max, row_sum)
        row_sum /= grow
    _store_rows(
        o, batch, head, first_query, stride_o_row, n_queries, acc / row_sum[:, None], DESCRIPTORS, BM, D, BD
    )  # fmt: skip
    if not DROPOUT:  # last: then it has registers
        _store_lse(lse_ptr, batch_head, queries, n_queries, row_max, row_sum)


@triton.jit
def _attention_delta_kernel(
    o_ptr, do_ptr, lse_ptr, padded_lse_ptr, delta_ptr, stride_o_batch, stride_o_head, stride_o_row,
    stride_do_batch, stride_do_head, stride_do_row, n_heads, n_queries, n_padded,
    BM: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write delta = rowsum(o * do), the part of the softmax gradient that is the same for all keys of a query.

    That and a copy of lse go to rows of n_padded queries, of which those past the last have no weight: what reads whole
    tiles of them needs no mask.
    """
    tiles = tl.cdiv(n_padded, BM)
    batch_head = tl.program_id(0) // tiles
    first_query = tl.program_id(0) % tiles * BM
    batch, head = batch_head // n_heads, batch_head % n_heads
    o_ptr = _of_head(o_ptr, batch, head, stride_o_batch, stride_o_head, False)
    do_ptr = _of_head(do_ptr, batch, head, stride_do_batch, stride_do_head, False)
    o = _load_rows(o_ptr, batch, head, first_query, stride_o_row, n_queries, True, False, BM, D, BD)  # [BM, BD]
    do = _load_rows(do_ptr, batch, head, first_query, stride_do_row, n_queries, True, False, BM, D, BD)
    queries = first_query + tl.arange(0, BM)
    row = batch_head.to(tl.int64) * n_padded + queries
    tl.store(delta_ptr + row, tl.sum(o.to(tl.float32) * do.to(tl.float32), axis=1))
    p_lse = lse_ptr + batch_head.to(tl.int64) * n_queries + queries
    # past the last query: exp2(score - inf) = 0
    tl.store(padded_lse_ptr + row, tl.load(p_lse, mask=queries < n_queries, other=float("inf")))


@triton.jit
def _accumulate_dk_dv(
    dk, dv, b_k, b_v, q, do, lse_ptr, delta_ptr, batch, head, first_key, first_query, last_query,
    stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold, grow,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the queries [first_query, last_query) to the gradients of one tile of keys. Works on transposed scores."""
    keys = first_key + tl.arange(0, BN)
    for start in range(first_query, last_query, BM):
        queries = start + tl.arange(0, BM)
        b_q = _load_rows(q, batch, head, start, stride_q_row, n_queries, True, DESCRIPTORS, BM, D, BD)  # [BM, BD]
        b_do = _load_rows(do, batch, head, start, stride_do_row, n_queries, True, DESCRIPTORS, BM, D, BD)  # [BM, BD]
        lse = tl.load(lse_ptr + queries)  # [BM]
        delta = tl.load(delta_ptr + queries)  # [BM]
        zeros = tl.zeros([BN, BM], dtype=tl.float32)
        p = tl.exp2(tile.dot(b_k, tl.trans(b_q), zeros, PRECISION) * scale_log2 - lse[None, :])  # [BN, BM]
        if MASKED:
            seen = keys[:, None] <= queries[None, :] + (n_keys - n_queries)
            p = tl.where(seen, p, 0.0)
        dp = tile.dot(b_v, tl.trans(b_do), zeros, PRECISION)  # [BN, BM]
        p_dropped = p
        if DROPOUT:
            kept = philox.kept_scores(seed, batch_head, start, first_key, threshold, BM, BN, True)  # [BN, BM]
            p_dropped = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp, 0.0) * grow
        dv = tile.dot(p_dropped.to(b_do.dtype), b_do, dv, PRECISION)
        dk = tile.dot((p * (dp - delta[None, :])).to(b_q.dtype), b_q, dk, PRECISION)
    return dk, dv


@triton.jit
def _attention_dk_dv_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_do_batch, stride_do_head, stride_do_row,
    stride_dk_batch, stride_dk_head, stride_dk_row,
    n_heads, n_batch_heads, n_queries, n_keys, n_padded, scale, scale_log2, threshold, grow,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    # the first keys are seen by most queries: the longest tiles come first
    batch_head = tl.program_id(0) % n_batch_heads
    first_key = tl.program_id(0) // n_batch_heads * BN
    batch, head = batch_head // n_heads, batch_head % n_heads
    q = _of_head(q, batch, head, stride_q_batch, stride_q_head, DESCRIPTORS)
    k = _of_head(k, batch, head, stride_k_batch, stride_k_head, DESCRIPTORS)
    v = _of_head(v, batch, head, stride_v_batch, stride_v_head, DESCRIPTORS)
    do = _of_head(do, batch, head, stride_do_batch, stride_do_head, DESCRIPTORS)
    dk = _of_head(dk, batch, head, stride_dk_batch, stride_dk_head, DESCRIPTORS)
    dv = _of_head(dv, batch, head, stride_dk_batch, stride_dk_head, DESCRIPTORS)  # laid out as dk
    lse_ptr += batch_head.to(tl.int64) * n_padded
    delta_ptr += batch_head.to(tl.int64) * n_padded
    seed = tl.load(seed_ptr) if DROPOUT else 0

    b_k = _load_rows(k, batch, head, first_key, stride_k_row, n_keys, True, DESCRIPTORS, BN, D, BD)  # [BN, BD]
    b_v = _load_rows(v, batch, head, first_key, stride_v_row, n_keys, True, DESCRIPTORS, BN, D, BD)  # [BN, BD]
    b_dk = tl.zeros([BN, BD], dtype=tl.float32)
    b_dv = tl.zeros([BN, BD], dtype=tl.float32)
    # queries before `diagonal` see none of these keys, those from `unmasked` on see all of them
    diagonal = tl.maximum(first_key - (n_keys - n_queries), 0) // BM * BM
    unmasked = tl.maximum(first_key + BN - 1 - (n_keys - n_queries), 0)
    unmasked = tl.minimum(tl.cdiv(unmasked, BM) * BM, n_queries)
    b_dk, b_dv = _accumulate_dk_dv(
        b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, batch, head, first_key, diagonal, unmasked,
        stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold, grow,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BM=BM, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    b_dk, b_dv = _accumulate_dk_dv(
        b_dk, b_dv, b_k, b_v, q, do, lse_ptr, delta_ptr, batch, head, first_key, unmasked, n_queries,
        stride_q_row, stride_do_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold, grow,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BM=BM, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    _store_rows(dk, batch, head, first_key, stride_dk_row, n_keys, b_dk * scale, DESCRIPTORS, BN, D, BD)
    if DROPOUT:
        b_dv *= grow
    _store_rows(dv, batch, head, first_key, stride_dk_row, n_keys, b_dv, DESCRIPTORS, BN, D, BD)


@triton.jit
def _accumulate_dq(
    dq, b_q, b_do, lse, delta, k, v, batch, head, first_query, first_key, last_key,
    stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold, grow,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Add the keys [first_key, last_key) to the gradient of one tile of queries."""
    queries = first_query + tl.arange(0, b_q.shape[0])
    for start in range(first_key, last_key, BN):
        keys = start + tl.arange(0, BN)
        b_k = _load_rows(k, batch, head, start, stride_k_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        b_v = _load_rows(v, batch, head, start, stride_v_row, n_keys, MASKED, DESCRIPTORS, BN, D, BD)  # [BN, BD]
        zeros = tl.zeros([b_q.shape[0], BN], dtype=tl.float32)
        p = tl.exp2(tile.dot(b_q, tl.trans(b_k), zeros, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        if MASKED:
            seen = keys[None, :] <= queries[:, None] + (n_keys - n_queries)
            p = tl.where(seen, p, 0.0)
        dp = tile.dot(b_do, tl.trans(b_v), zeros, PRECISION)  # [BM, BN]
        if DROPOUT:
            kept = philox.kept_scores(seed, batch_head, first_query, start, threshold, b_q.shape[0], BN, False)
            dp = tl.where(kept, dp, 0.0) * grow
        dq = tile.dot((p * (dp - delta[:, None])).to(b_k.dtype), b_k, dq, PRECISION)
    return dq


@triton.jit
def _attention_dq_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dq, seed_ptr,
    stride_q_batch, stride_q_head, stride_q_row, stride_k_batch, stride_k_head, stride_k_row,
    stride_v_batch, stride_v_head, stride_v_row, stride_do_batch, stride_do_head, stride_do_row,
    stride_dq_batch, stride_dq_head, stride_dq_row,
    n_heads, n_batch_heads, n_queries, n_keys, n_padded, scale, scale_log2, threshold, grow,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0) % n_batch_heads
    first_query = (tl.cdiv(n_queries, BM) - 1 - tl.program_id(0) // n_batch_heads) * BM
    batch, head = batch_head // n_heads, batch_head % n_heads
    q = _of_head(q, batch, head, stride_q_batch, stride_q_head, DESCRIPTORS)
    k = _of_head(k, batch, head, stride_k_batch, stride_k_head, DESCRIPTORS)
    v = _of_head(v, batch, head, stride_v_batch, stride_v_head, DESCRIPTORS)
    do = _of_head(do, batch, head, stride_do_batch, stride_do_head, DESCRIPTORS)
    dq = _of_head(dq, batch, head, stride_dq_batch, stride_dq_head, DESCRIPTORS)
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
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold, grow,
        MASKED=False, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    b_dq = _accumulate_dq(
        b_dq, b_q, b_do, lse, delta, k, v, batch, head, first_query, unmasked_end, end,
        stride_k_row, stride_v_row, n_queries, n_keys, scale_log2, seed, batch_head, threshold, grow,
        MASKED=True, DROPOUT=DROPOUT, PRECISION=PRECISION, DESCRIPTORS=DESCRIPTORS, BN=BN, D=D, BD=BD,
    )  # fmt: skip
    _store_rows(dq, batch, head, first_query, stride_dq_row, n_queries, b_dq * scale, DESCRIPTORS, BM, D, BD)
