"""Dropout's random words are those of Philox4x32, and its masks functions of the seed and the position.

`test_operators.py` compares the masks of all passes, block shapes and dtypes.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import kernels
from kernels import philox
from tests.support.oracle import DEVICE

# Random123, tests/kat_vectors, Philox4x32 with seven rounds: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
]


def expected_words(
    seed: int, c0: np.ndarray | int, c1: np.ndarray | int, c2: np.ndarray | int, c3: int = 0
) -> list[np.ndarray]:
    """Philox4x32 with seven rounds in NumPy: four words in uint64, in the broadcast shape of the counters."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in (c0, c1, c2, c3))
    for i in range(7):
        k0, k1 = (np.uint64(k % 2**32) for k in (seed + i * 0x9E3779B9, (seed >> 32) + i * 0xBB67AE85))
        product_0, product_2 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = product_2 >> half ^ c1 ^ k0, product_2 & low
        c2, c3 = product_0 >> half ^ c3 ^ k1, product_0 & low
    return np.broadcast_arrays(c0, c1, c2, c3)


def chosen(words: list[np.ndarray], index: np.ndarray, dropout_p: float) -> torch.Tensor:
    """True if the word at `index` keeps its element."""
    word = np.choose(index, words).astype(np.uint32).view(np.int32)
    return torch.from_numpy(word >= philox.dropout_constants(dropout_p)[0])


def expected_scores(seed: int, head: np.ndarray, query: np.ndarray, key: np.ndarray, dropout_p: float) -> torch.Tensor:
    words = expected_words(seed, key // 16 * 8 + key % 8, query // 16 * 8 + query % 8, head)
    head, query, key = np.broadcast_arrays(head, query, key)
    return chosen(words, query // 8 % 2 * 2 + key // 8 % 2, dropout_p)


def expected_elements(seed: int, row: np.ndarray, column: np.ndarray, dropout_p: float) -> torch.Tensor:
    words = expected_words(seed, column // 4, row % 2**32, row // 2**32)
    return chosen(words, np.broadcast_arrays(row, column)[1] % 4, dropout_p)


@triton.jit
def _scores_kernel(
    out, seed, head, first_query, first_key, threshold, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSED: tl.constexpr
):
    kept = philox.kept_scores(tl.load(seed), head, first_query, first_key, threshold, BM, BN, TRANSPOSED)
    queries, keys = tl.arange(0, BM), tl.arange(0, BN)
    if TRANSPOSED:
        tl.store(out + queries[None, :] * BN + keys[:, None], kept.to(tl.int8))
    else:
        tl.store(out + queries[:, None] * BN + keys[None, :], kept.to(tl.int8))


@triton.jit
def _elements_kernel(out, seed, first_row, first_col, threshold, BM: tl.constexpr, BN: tl.constexpr):
    rows = tl.arange(0, BM)
    kept = philox.kept_elements(tl.load(seed), first_row + rows.to(tl.int64), first_col, threshold, BM, BN)
    tl.store(out + rows[:, None] * BN + tl.arange(0, BN)[None, :], kept.to(tl.int8))


def scores(
    seed: int, head: int, first_query: int, first_key: int, shape: tuple[int, int], transposed: bool, p: float = 0.3
) -> torch.Tensor:
    out = torch.full(shape, -1, dtype=torch.int8, device=DEVICE)
    seeds = torch.tensor([seed], device=DEVICE)
    blocks = {"BM": shape[0], "BN": shape[1], "TRANSPOSED": transposed}
    _scores_kernel[(1,)](out, seeds, head, first_query, first_key, philox.dropout_constants(p)[0], **blocks)
    return out.cpu() == 1


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_expected_words_are_the_known_answers(counter, key, words):
    assert tuple(int(word) for word in expected_words(key[0] + 2**32 * key[1], *counter)) == words


@pytest.mark.parametrize("seed", [3, 2**40 + 12345, 2**63 - 1, -3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 16), (32, 64), (64, 32), (16, 128)], ids=str)
def test_score_masks_are_functions_of_the_position(shape, transposed, seed):
    """Up to the last position of an int32."""
    for head, first_query, first_key in ((0, 0, 0), (7, 2**31 - 128, 2**31 - 128), (2**31 - 1, 128, 2**31 - 1024)):
        queries, keys = (first_query + np.arange(shape[0]))[:, None], (first_key + np.arange(shape[1]))[None, :]
        expected = expected_scores(seed % 2**64, np.asarray(head), queries, keys, 0.3)
        assert torch.equal(scores(seed, head, first_query, first_key, shape, transposed), expected)


@pytest.mark.parametrize("seed", [3, 2**40 + 12345, -3])
@pytest.mark.parametrize("shape", [(1, 1), (8, 2), (4, 4), (1, 64), (8, 16)], ids=str)
def test_element_masks_are_functions_of_the_position(shape, seed):
    """Also beyond an int32."""
    for first_row, first_col in ((0, 0), (2**32 - 2, 4), (2**33 + 5, 2**31 - 128)):
        out = torch.full(shape, -1, dtype=torch.int8, device=DEVICE)
        seeds, threshold = torch.tensor([seed], device=DEVICE), philox.dropout_constants(0.3)[0]
        _elements_kernel[(1,)](out, seeds, first_row, first_col, threshold, BM=shape[0], BN=shape[1])
        rows, columns = (first_row + np.arange(shape[0]))[:, None], (first_col + np.arange(shape[1]))[None, :]
        assert torch.equal(out.cpu() == 1, expected_elements(seed % 2**64, rows, columns, 0.3))


def test_attention_drops_by_head_query_and_key():
    """Queries are aligned to the last keys: the first of 37 attends to 25."""
    q, k = (torch.zeros(2, 3, n, 61, device=DEVICE) for n in (37, 61))
    identity = torch.eye(61, device=DEVICE).expand(2, 3, 61, 61)
    mask = (kernels.causal_attention(q, k, identity, dropout_p=0.4, seed=11) != 0).cpu()
    heads, queries, keys = np.arange(6).reshape(2, 3, 1, 1), np.arange(37)[:, None], np.arange(61)
    expected = expected_scores(11, heads, queries, keys, 0.4) & torch.from_numpy(keys <= queries + 24)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("width", [3, 70, 8209])  # in registers or in chunks
def test_add_layer_norm_drops_by_row_and_column(width):
    x = torch.ones(5, width, device=DEVICE)
    h = kernels.add_layer_norm(x, torch.zeros_like(x), None, None, dropout_p=0.4, seed=11)[1]
    expected = expected_elements(11, np.arange(5)[:, None], np.arange(width)[None, :], 0.4)
    assert torch.equal((h != 0).cpu(), expected)


@pytest.mark.parametrize("p", [0.5, 0.1, 1e-6, 2**-32, 1e-12, 1 - 1e-6, 1 - 2**-32, 1 - 2**-50])
def test_dropout_constants_are_exact(p):
    threshold, scale = philox.dropout_constants(p)
    assert -(2**31) <= threshold < 2**31
    assert abs((threshold + 2**31) / 2**32 - p) <= 2**-32
    assert scale == 1 / (1 - p)


@pytest.mark.parametrize("dropout_p", [0.5, 0.1, 0.9])
def test_score_masks_are_uncorrelated(dropout_p):
    """Pairs within a call, of calls one bit apart, of other heads and of other seeds."""

    def mask(seed: int, head: int) -> np.ndarray:
        keep = scores(seed, head, 0, 0, (256, 256), False, dropout_p).numpy()
        return (keep - (1 - dropout_p)) / (dropout_p * (1 - dropout_p)) ** 0.5

    first = mask(3, 5)
    pairs = {
        f"{rows} rows, {columns} columns": (first[rows:, columns:], first[: 256 - rows, : 256 - columns])
        for rows in (0, 1, 2, 8, 16, 64)
        for columns in (0, 1, 2, 4, 8, 16, 64)
        if rows + columns > 0
    }
    pairs |= {f"head {head}": (first, mask(3, head)) for head in (4, 6, 7, 13)}
    pairs |= {f"seed {seed}": (first, mask(seed, 5)) for seed in (2, 4, 3 + 2**32, 3 + 2**31)}
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean()) < 4 / a.size**0.5, name
