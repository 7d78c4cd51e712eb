"""Windows predict each token once, with the promised context; scores equal a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptfast import GPT, GPTConfig
from gptfast.data.shards import Tokens
from gptfast.evaluation import perplexity
from gptfast.evaluation.perplexity import TextScore, Windows
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer
from tests.support.likelihood import exact_log_probabilities
from tests.support.small_tokenizers import small_tiktoken

TEXT = "Zürich, the naïve 東京 \U0001f600; then that thing.\n" * 3
BYTES = ByteTokenizer()
IDS = BYTES.encode(TEXT)
TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.of_documents([TEXT]),
    "byte": BYTES,
    "tiktoken": small_tiktoken(b"th", b" th"),
    "word": WordTokenizer.of_documents([TEXT]),
}


def build(vocab_size: int = 257, **settings) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "init_std": 0.3}
    return GPT(GPTConfig(vocab_size=vocab_size, **shape | settings), "eager")


def windows_of(length: int, block_size: int, stride: int) -> Windows:
    """Windows of the text 0, 1, 2, ..."""
    return Windows(Tokens([np.arange(length, dtype=np.uint16)]), block_size, stride)


def contexts(windows: Windows, batch_size: int, limit: int | None = None) -> dict[int, list[int]]:
    """The tokens before each predicted one in its window."""
    found: dict[int, list[int]] = {}
    for idx, targets in windows.batches(batch_size, limit):
        assert idx.shape == targets.shape
        assert len(idx) <= batch_size
        for row, wanted in zip(idx.tolist(), targets.tolist(), strict=True):
            for place, token in enumerate(wanted):
                if token >= 0:
                    assert token not in found, "predicted twice"
                    found[token] = row[: place + 1]
    return found


def window_start(token: int, block_size: int, stride: int) -> int:
    """The first multiple of the stride from which a window of `block_size` reaches the token as a target."""
    return -(-max(0, token - block_size) // stride) * stride


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_windows_predict_each_token_once(length: int, block_size: int, stride: int, batch_size: int):
    stride = min(stride, block_size)
    found = contexts(windows_of(length, block_size, stride), batch_size)
    assert sorted(found) == list(range(1, length))
    for token, before in found.items():
        assert before == list(range(window_start(token, block_size, stride), token))
        if token > block_size:
            assert block_size - stride + 1 <= len(before) <= block_size


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_windows_are_counted_and_limited(length: int, block_size: int, stride: int, limit: int):
    windows = windows_of(length, block_size, min(stride, block_size))
    assert len(windows) == sum(len(idx) for idx, _ in windows.batches(3))
    assert sum(len(idx) for idx, _ in windows.batches(3, limit)) == min(limit, len(windows))
    some, everything = contexts(windows, 3, limit), contexts(windows, 3)
    assert some == {token: everything[token] for token in range(1, len(some) + 1)}


@pytest.mark.parametrize(
    ("length", "stride", "message"),
    [
        (20, 0, "stride.* 0"),
        (20, -1, "stride.* -1"),
        (20, 9, "block_size=8.* 9"),
        (0, 8, "0 tokens"),
        (1, 8, "1 tokens"),
    ],
)
def test_windows_reject_bad_strides_and_short_texts(length: int, stride: int, message: str):
    with pytest.raises(ValueError, match=message):
        windows_of(length, 8, stride)


def score(
    model: GPT, tokenizer: Tokenizer, ids: np.ndarray, stride: int = 8, batch_size: int = 4, limit=None
) -> TextScore:
    windows = Windows(Tokens([ids]), 8, stride)
    return perplexity.score(model, tokenizer, windows, torch.float32, batch_size, limit)


@pytest.mark.parametrize("stride", [8, 3, 1])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_score_is_that_of_a_float64_loop(tokenizer: Tokenizer, stride: int):
    ids, model = tokenizer.encode(TEXT), build(tokenizer.vocab_size)
    row, costs = ids.tolist(), []
    for token in range(1, len(row)):
        costs.append(-exact_log_probabilities(model, row[window_start(token, 8, stride) : token + 1])[-1])
    found = score(model, tokenizer, ids, stride)
    assert found.tokens == len(costs) == len(ids) - 1
    assert found.loss.value == pytest.approx(np.mean(costs), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(costs)), rel=1e-4)
    if isinstance(tokenizer, WordTokenizer):
        assert (found.bytes, found.bits_per_byte) == (None, None)
        return
    assert found.bytes == len(TEXT.encode()) - len(tokenizer.decode_bytes(row[:1]))
    bits = found.bits_per_byte
    assert bits.value == pytest.approx(sum(costs) / math.log(2) / found.bytes, rel=1e-5)
    assert bits.stderr / bits.value == pytest.approx(found.loss.stderr / found.loss.value, rel=1e-9)


def test_score_standard_error_is_over_windows():
    model = build()
    means = [-np.mean(exact_log_probabilities(model, IDS[start : start + 9].tolist())) for start in range(0, 40, 8)]
    found = score(model, BYTES, IDS[:41])
    assert found.windows == len(means) == 5
    assert found.loss.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(5), rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 7, 1000])
def test_score_does_not_depend_on_the_batch_size(batch_size: int):
    one, other = (score(build(), BYTES, IDS, 3, size) for size in (1, batch_size))
    assert other.loss.value == pytest.approx(one.loss.value, rel=1e-6)
    assert other.loss.stderr == pytest.approx(one.loss.stderr, rel=1e-4)
    assert (other.tokens, other.bytes, other.windows) == (one.tokens, one.bytes, one.windows)


def test_score_stops_at_the_limit():
    found = score(build(), BYTES, IDS, limit=3)
    assert found == score(build(), BYTES, IDS[:25])
    assert (found.windows, found.tokens, found.bytes) == (3, 24, 24)
    single = score(build(), BYTES, IDS, limit=1)
    assert (single.windows, single.loss.stderr, single.bits_per_byte.stderr) == (1, None, None)
    shortest = score(build(), BYTES, BYTES.encode("no"))
    assert (shortest.tokens, shortest.bytes, shortest.windows, shortest.loss.stderr) == (1, 1, 1, None)


def test_score_counts_ends_of_documents_as_tokens_without_bytes():
    model = build()
    ids = np.concatenate((BYTES.encode("ab"), [256], BYTES.encode("cd"), [256]))
    found = score(model, BYTES, ids)
    assert (found.tokens, found.bytes) == (5, 3)
    assert found.loss.value == pytest.approx(-np.mean(exact_log_probabilities(model, ids.tolist())), rel=1e-5)
    without = score(model, BYTES, np.array([97, 256, 256]))
    assert (without.bytes, without.bits_per_byte) == (0, None)


def test_perplexity_that_overflows_is_infinite_and_null_in_json():
    model = build(tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = score(model, BYTES, IDS)
    assert (found.perplexity, found.fields()["perplexity"]) == (math.inf, None)
