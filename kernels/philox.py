"""Dropout masks from Philox4x32 (Salmon et al. 2011), with the seed as key and an element's position as counter.

No mask is stored, and no order matters: each pass recomputes an element's decision from the seed and its position,
whatever the pass's blocks. One call of the generator returns four words, which decide on four elements of one thread.
"""

from __future__ import annotations

import triton
import triton.language as tl


def dropout_constants(dropout_p: float) -> tuple[int, float]:
    """Return the keep threshold and the dropout scale 1 / (1 - dropout_p), for dropout_p in [0, 1).

    An element is kept if its word, as int32, is at least the threshold. That drops dropout_p of the words to 2**-32.
    """
    dropped = min(round(dropout_p * 2**32), 2**32 - 1)
    return dropped - 2**31, 1.0 / (1.0 - dropout_p)


@triton.jit
def _words(seed, c0, c1, c2):
    """Return four uint32 words for each counter (c0, c1, c2, 0), whose shapes broadcast, with the seed as key.

    Ten rounds are usual; seven pass BigCrush (table 2 of the paper). The first two are cheap, because they have the
    counters' own shapes. A 64-bit product is one instruction, its two halves would be two.
    """
    c0, c1, c2 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c3 = k0 * 0
    for _ in tl.static_range(7):
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_2.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def kept_scores(
    seed, head, first_query, first_key, keep_threshold, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Return the keep mask of a tile of scores, [BM, BN], or [BN, BM] if TRANSPOSED.

    Tiles start at multiples of 16. One call decides on two queries 8 apart and two keys 8 apart: in the accumulator
    layout of matrix instructions, transposed or not, one thread holds all four.
    """
    ROWS: tl.constexpr = BN if TRANSPOSED else BM
    COLS: tl.constexpr = BM if TRANSPOSED else BN
    first_row = first_key if TRANSPOSED else first_query
    first_col = first_query if TRANSPOSED else first_key
    # rows and columns without their bit 3, as [blocks of 16, halves, 8] each; halved before the sum against overflow
    rows = tl.reshape(first_row // 2 + tl.arange(0, ROWS // 2), [ROWS // 16, 1, 8, 1, 1, 1])
    cols = tl.reshape(first_col // 2 + tl.arange(0, COLS // 2), [1, 1, 1, COLS // 16, 1, 8])
    lower = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1, 1, 1]) == 1
    right = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2, 1]) == 1
    if TRANSPOSED:
        w00, w10, w01, w11 = _words(seed, rows, cols, head)
    else:
        w00, w01, w10, w11 = _words(seed, cols, rows, head)
    # selecting by position is free where a thread has all four words; tl.join would move them through shared memory
    words = tl.where(lower, tl.where(right, w11, w10), tl.where(right, w01, w00))
    return tl.reshape(words.to(tl.int32, bitcast=True) >= keep_threshold, [ROWS, COLS])


@triton.jit
def kept_elements(seed, rows, first_col, keep_threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Return the keep mask [BM, BN] of the rows [BM], int64, and BN columns.

    Columns start at a multiple of 4. One call decides on four adjacent elements, which one thread loads together.
    """
    TOGETHER: tl.constexpr = 4 if BN > 4 else BN
    groups = tl.reshape(first_col // 4 + tl.arange(0, BN // TOGETHER), [1, BN // TOGETHER, 1])
    rows = tl.reshape(rows, [BM, 1, 1])
    w0, w1, w2, w3 = _words(seed, groups, rows, rows >> 32)
    word = tl.reshape(tl.arange(0, TOGETHER), [1, 1, TOGETHER])
    words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return tl.reshape(words.to(tl.int32, bitcast=True) >= keep_threshold, [BM, BN])
