"""A text's windows predict each token once, after what they say; its score is that of a float64 loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gptfast import GPT, GPTConfig
from gptfast.data.shards import Tokens
from gptfast.evaluation import perplexity
from gptfast.evaluation.perplexity import Windows
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer, Tokenizer, WordTokenizer
from tests.support.likelihood import exact_log_probabilities

TEXT = "Zürich, the naïve 東京 \U0001f600; then that thing.\n" * 3


def build(vocab_size: int, **settings) -> GPT:
    torch.manual_seed(0)
    shape = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "init_std": 0.3}
    return GPT(GPTConfig(vocab_size=vocab_size, **shape | settings), "eager")


def windows_of(number: int, block_size: int, stride: int) -> Windows:
    """Of the text 0, 1, 2, ..."""
    return Windows(Tokens([np.arange(number, dtype=np.uint16)]), block_size, stride)


def contexts(windows: Windows, batch_size: int, limit: int | None = None) -> dict[int, list[int]]:
    """By each token that is predicted what stands before it in its window."""
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


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_each_token_is_predicted_once_by_those_before_it(number: int, block_size: int, stride: int, batch_size: int):
    stride = min(stride, block_size)
    found = contexts(windows_of(number, block_size, stride), batch_size)
    assert sorted(found) == list(range(1, number))
    for token, before in found.items():
        # the first window that has it begins at the first multiple of the stride that is not too far away
        start = -(-max(0, token - block_size) // stride) * stride
        assert before == list(range(start, token))
        if token > block_size:
            assert block_size - stride + 1 <= len(before) <= block_size


@given(st.integers(2, 60), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5))
def test_their_number_and_the_first_of_them(number: int, block_size: int, stride: int, limit: int):
    windows = windows_of(number, block_size, min(stride, block_size))
    whole = sum(len(idx) for idx, _ in windows.batches(3))
    assert len(windows) == whole
    some, everything = contexts(windows, 3, limit), contexts(windows, 3)
    assert sum(len(idx) for idx, _ in windows.batches(3, limit)) == min(limit, whole)
    assert some == {token: everything[token] for token in sorted(some)}
    assert sorted(some) == list(range(1, len(some) + 1))


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_out_of_range(stride: int):
    with pytest.raises(ValueError, match=f"stride must be from 1 to block_size=8, got {stride}"):
        windows_of(20, 8, stride)


@pytest.mark.parametrize("number", [0, 1])
def test_too_short_a_text(number: int):
    with pytest.raises(ValueError, match=f"the text has {number} tokens, at least 2 are needed"):
        windows_of(number, 8, 8)


def small_encoding() -> tiktoken.Encoding:
    """An encoding whose vocabulary need not be downloaded."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b" th": 257}
    return tiktoken.Encoding("gpt2", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})


TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.of_documents([TEXT]),
    "byte": ByteTokenizer(),
    "tiktoken": TiktokenTokenizer(small_encoding()),
    "word": WordTokenizer.of_documents([TEXT]),
}


def score(model: GPT, tokenizer: Tokenizer, ids: np.ndarray, stride: int = 8, batch_size: int = 4, limit=None):
    windows = Windows(Tokens([ids]), 8, stride)
    return perplexity.score(model, tokenizer, windows, torch.float32, batch_size, limit)


@pytest.mark.parametrize("stride", [8, 3, 1])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_score_is_that_of_a_float64_loop(tokenizer: Tokenizer, stride: int):
    """Each token by itself, with the tokens before it that the windows promise."""
    ids, model = tokenizer.encode(TEXT), build(tokenizer.vocab_size)
    row, costs = ids.tolist(), []
    for token in range(1, len(row)):
        start = -(-max(0, token - 8) // stride) * stride
        costs.append(-exact_log_probabilities(model, row[start : token + 1])[-1])
    found = score(model, tokenizer, ids, stride)
    assert found.tokens == len(costs) == len(ids) - 1
    assert found.loss.value == pytest.approx(np.mean(costs), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(costs)), rel=1e-4)
    if isinstance(tokenizer, WordTokenizer):
        assert (found.bytes, found.bits_per_byte) == (None, None)
        return
    size = len(TEXT.encode()) - len(tokenizer.decode_bytes(row[:1]))
    assert found.bytes == size
    assert found.bits_per_byte.value == pytest.approx(sum(costs) / math.log(2) / size, rel=1e-5)
    assert found.bits_per_byte.stderr / found.bits_per_byte.value == pytest.approx(
        found.loss.stderr / found.loss.value, rel=1e-9
    )


def test_the_standard_error_is_over_windows():
    tokenizer, ids = ByteTokenizer(), ByteTokenizer().encode(TEXT)[:41]
    model = build(tokenizer.vocab_size)
    means = []
    for start in range(0, 40, 8):
        means.append(-np.mean(exact_log_probabilities(model, ids[start : start + 9].tolist())))
    found = score(model, tokenizer, ids)
    assert found.windows == len(means) == 5
    assert found.loss.stderr == pytest.approx(np.std(means, ddof=1) / math.sqrt(5), rel=1e-4)


def test_the_size_of_batches_changes_nothing():
    tokenizer, ids = ByteTokenizer(), ByteTokenizer().encode(TEXT)
    model = build(tokenizer.vocab_size)
    one = score(model, tokenizer, ids, 3, batch_size=1)
    for batch_size in (2, 7, 1000):
        other = score(model, tokenizer, ids, 3, batch_size)
        assert other.loss.value == pytest.approx(one.loss.value, rel=1e-6)
        assert other.loss.stderr == pytest.approx(one.loss.stderr, rel=1e-4)
        assert (other.tokens, other.bytes, other.windows) == (one.tokens, one.bytes, one.windows)


def test_so_many_windows():
    tokenizer, ids = ByteTokenizer(), ByteTokenizer().encode(TEXT)
    model = build(tokenizer.vocab_size)
    found, first = score(model, tokenizer, ids, limit=3), score(model, tokenizer, ids[:25])
    assert found == first
    assert (found.windows, found.tokens, found.bytes) == (3, 24, 24)
    alone = score(model, tokenizer, ids, limit=1)
    assert (alone.windows, alone.loss.stderr) == (1, None)
    assert alone.bits_per_byte.stderr is None


def test_a_text_of_two_tokens():
    tokenizer = ByteTokenizer()
    found = score(build(257), tokenizer, tokenizer.encode("no"))
    assert (found.tokens, found.bytes, found.windows, found.loss.stderr) == (1, 1, 1, None)


def test_models_that_say_the_same_have_the_same_bits_per_byte():
    """A model that knows nothing costs log2 V for each token, whatever its tokens."""
    for tokenizer in (TOKENIZERS["char"], TOKENIZERS["tiktoken"]):
        model = build(tokenizer.vocab_size, tie_weights=False)
        nn.init.zeros_(model.lm_head.weight)
        found = score(model, tokenizer, tokenizer.encode(TEXT))
        assert found.bits_per_byte.value == pytest.approx(math.log2(tokenizer.vocab_size) * found.tokens / found.bytes)


def test_ends_of_documents_cost_what_they_cost_and_have_no_bytes():
    tokenizer, model = ByteTokenizer(), build(257)
    ids = np.concatenate((tokenizer.encode("ab"), [256], tokenizer.encode("cd"), [256]))
    found = score(model, tokenizer, ids)
    assert (found.tokens, found.bytes) == (5, 3)
    assert found.loss.value == pytest.approx(-np.mean(exact_log_probabilities(model, ids.tolist())), rel=1e-5)
    nothing = score(model, tokenizer, np.array([97, 256, 256]))
    assert (nothing.bytes, nothing.bits_per_byte) == (0, None)


def test_a_loss_beyond_floats():
    model = build(257, tie_weights=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    assert score(model, ByteTokenizer(), ByteTokenizer().encode(TEXT)).perplexity == math.inf


def test_progress():
    class Bar:
        done = 0

        def update(self, number: int) -> None:
            self.done += number

    windows, bar = Windows(Tokens([ByteTokenizer().encode(TEXT)]), 8, 5), Bar()
    perplexity.score(build(257), ByteTokenizer(), windows, torch.float32, 4, None, bar)
    assert bar.done == len(windows)
