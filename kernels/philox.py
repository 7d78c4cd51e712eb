"""Random decisions of dropout: Philox4x32 (Salmon et al. 2011), whose key is the seed and whose counter is a position.

Nothing is stored and nothing has an order: a decision depends on the seed and on the element's own position, so that
every pass draws the same ones, whatever its blocks. A call of the generator makes four words, each of which decides on
one element; which four elements share a call is chosen such that they are one thread's.
"""

from __future__ import annotations

import triton
import triton.language as tl


def dropout_constants(dropout_p: float) -> tuple[int, float]:
    """Of the share to drop, in [0, 1): what a word, read as int32, must reach to keep, and the growth of what is kept.

    The share of words below it is dropout_p to 2**-32, however small or close to 1 that is.
    """
    dropped = min(round(dropout_p * 2**32), 2**32 - 1)
    return dropped - 2**31, 1.0 / (1.0 - dropout_p)


@triton.jit
def _words(seed, c0, c1, c2):
    """Four uint32 words for each counter (c0, c1, c2, 0), of shapes that broadcast together, with the seed as the key.

    Seven rounds pass all tests of BigCrush (table 2 of the paper), ten are the usual. The first two cost next to
    nothing: they are of the counters' own shapes. A product of 64 bits is one instruction, its halves would be two.
    """
    c0, c1, c2 = c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c3 = k0 * 0
    for _ in tl.static_range(7):
        of_c0 = c0.to(tl.uint64) * 0xD2511F53
        of_c2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (of_c2 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = of_c2.to(tl.uint32)
        c2 = (of_c0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = of_c0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def kept_scores(
    seed, head, first_query, first_key, threshold, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Whether dropout keeps each score of a tile [BM, BN], or [BN, BM] if TRANSPOSED: of seed, head, query and key.

    Tiles begin at multiples of 16. One call decides on two queries, 8 apart, and two keys, 8 apart: where matrix units
    leave a tile or its transpose, a thread has all four.
    """
    ROWS: tl.constexpr = BN if TRANSPOSED else BM
    COLS: tl.constexpr = BM if TRANSPOSED else BN
    first_row = first_key if TRANSPOSED else first_query
    first_col = first_query if TRANSPOSED else first_key
    # rows and columns less the bit of 8, as [blocks of 16, halves, 8] each; halved before they are added: no overflow
    rows = tl.reshape(first_row // 2 + tl.arange(0, ROWS // 2), [ROWS // 16, 1, 8, 1, 1, 1])
    cols = tl.reshape(first_col // 2 + tl.arange(0, COLS // 2), [1, 1, 1, COLS // 16, 1, 8])
    lower = tl.reshape(tl.arange(0, 2), [1, 2, 1, 1, 1, 1]) == 1
    right = tl.reshape(tl.arange(0, 2), [1, 1, 1, 1, 2, 1]) == 1
    if TRANSPOSED:
        w00, w10, w01, w11 = _words(seed, rows, cols, head)
    else:
        w00, w01, w10, w11 = _words(seed, cols, rows, head)
    # choices by position, which are free where a thread has all four, and no joins: those take the layout that words
    # come in and move them through shared memory
    words = tl.where(lower, tl.where(right, w11, w10), tl.where(right, w01, w00))
    return tl.reshape(words.to(tl.int32, bitcast=True) >= threshold, [ROWS, COLS])


@triton.jit
def kept_elements(seed, rows, first_col, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Whether dropout keeps each element of the rows [BM], int64, and BN columns: of seed, row and column.

    Columns begin at a multiple of 4. One call decides on four neighbours, which are loaded together.
    """
    TOGETHER: tl.constexpr = 4 if BN > 4 else BN
    groups = tl.reshape(first_col // 4 + tl.arange(0, BN // TOGETHER), [1, BN // TOGETHER, 1])
    rows = tl.reshape(rows, [BM, 1, 1])
    w0, w1, w2, w3 = _words(seed, groups, rows, rows >> 32)
    word = tl.reshape(tl.arange(0, TOGETHER), [1, 1, TOGETHER])
    words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return tl.reshape(words.to(tl.int32, bitcast=True) >= threshold, [BM, BN])
