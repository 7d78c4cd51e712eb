"""Evaluation gives the same losses for any number of processes, and bits per byte for any tokenizer."""

from __future__ import annotations

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiktoken
import torch
from torch import Tensor, nn

from gptfast import GPT, GPTConfig, tokenizers
from gptfast.data.batches import Split
from gptfast.data.shards import Tokens
from gptfast.distributed import World
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer, Tokenizer, WordTokenizer
from gptfast.training.validation import EvalSet

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=1, n_head=2, n_embd=32, init_std=0.3)
TEXT = "Zürich, the naïve 東京 \U0001f600; then that thing.\n" * 8


def build(**settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), "eager")


def split_of(ids: np.ndarray, block_size: int = 8) -> Split:
    return Split(Tokens([ids]), block_size)


def random_sequences(count: int, batch_size: int) -> EvalSet:
    ids = np.random.default_rng(0).integers(31, size=8 * count + 1)
    return EvalSet(split_of(ids), batches=100, batch_size=batch_size)


def mean_loss(sequences: EvalSet, model: nn.Module, world: World | None = None) -> float:
    return sequences.mean_loss(model, torch.float32, world or World())


def loss_by_hand(sequences: EvalSet, model: GPT) -> float:
    """Mean over sequences of each sequence's mean, in float64."""
    exact, losses = copy.deepcopy(model).double().eval(), []
    for idx, targets in sequences.split.eval_batches(sequences.batches, sequences.batch_size):
        for row, following in zip(idx, targets, strict=True):
            log_probs = exact(row[None], row[None])[0][0].log_softmax(-1)
            losses.append(-log_probs.gather(1, following[:, None]).mean().item())
    return sum(losses) / len(losses)


def test_mean_loss_weighs_every_sequence_the_same():
    """Even if the last batch is smaller."""
    sequences, model = random_sequences(13, batch_size=6), build()
    assert [len(idx) for idx, _ in sequences.split.eval_batches(100, 6)] == [6, 6, 1]
    assert mean_loss(sequences, model) == pytest.approx(loss_by_hand(sequences, model), rel=1e-5)


def test_mean_loss_reads_a_limited_number_of_batches():
    sequences, model = random_sequences(13, batch_size=3), build()
    few = EvalSet(sequences.split, batches=2, batch_size=3)
    assert mean_loss(few, model) == pytest.approx(loss_by_hand(few, model), rel=1e-5)
    assert mean_loss(few, model) != pytest.approx(mean_loss(sequences, model), rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_mean_loss_leaves_no_trace(training: bool):
    sequences, model = random_sequences(5, batch_size=2), build(dropout=0.5).train(training)
    expected = mean_loss(sequences, build().eval())
    random = torch.get_rng_state()
    assert mean_loss(sequences, model) == mean_loss(sequences, model) == expected  # without dropout
    assert {module.training for module in model.modules()} == {training}
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


class Recorded(nn.Module):
    """A model that records its batches."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model, self.rows, self.dtypes = model, [], set()

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        assert not self.model.training
        logits, loss = self.model(idx, targets)
        self.rows.append(len(idx))
        self.dtypes.add(logits.dtype)
        return logits, loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_loss_multiplies_in_its_dtype(dtype):
    sequences, model = random_sequences(5, batch_size=2), Recorded(build())
    loss = sequences.mean_loss(model, dtype, World())
    assert model.dtypes == {dtype}
    assert loss == pytest.approx(mean_loss(sequences, build()), rel=0.01)


class ThreadWorld:
    """One of several processes, which are threads here."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, values: list) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._values = barrier, values

    def sum(self, values: Tensor) -> Tensor:
        self._values[self.rank] = values.clone()
        self._barrier.wait(10)
        return torch.stack(self._values).sum(0)


def losses_of(size: int, sequences: EvalSet, model: GPT) -> tuple[list[float], list[list[int]]]:
    """The loss that each of `size` processes computes, and the rows of its batches."""
    barrier, values = threading.Barrier(size), [None] * size
    models = [Recorded(copy.deepcopy(model)) for _ in range(size)]
    worlds = [ThreadWorld(rank, size, barrier, values) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        losses = list(threads.map(mean_loss, [sequences] * size, models, worlds))
    return losses, [recorded.rows for recorded in models]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_mean_loss_is_the_same_on_every_rank(ranks: int):
    """With batches of 12, 12 and 2 sequences; every rank runs the model equally often, as FSDP needs it."""
    sequences, model = random_sequences(26, batch_size=12), build()
    losses, rows = losses_of(ranks, sequences, model)
    assert losses == pytest.approx([loss_by_hand(sequences, model)] * ranks, rel=1e-5)
    assert len(set(losses)) == 1
    assert rows == [[12 // ranks] * 2 + [2 if ranks == 1 else 1]] * ranks


def test_mean_loss_takes_fewer_sequences_than_ranks():
    sequences, model = random_sequences(1, batch_size=4), build()
    losses, rows = losses_of(4, sequences, model)
    assert losses == pytest.approx([mean_loss(sequences, model)] * 4)
    assert rows == [[1]] * 4


def small_encoding() -> tiktoken.Encoding:
    """An encoding that needs no download."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b" th": 257}
    return tiktoken.Encoding("gpt2", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258})


LOSSLESS: dict[str, Tokenizer] = {
    "char": CharTokenizer.of_documents([TEXT]),
    "char with an end": CharTokenizer.of_documents([TEXT], end_of_text=True),
    "byte": ByteTokenizer(),
    "tiktoken": TiktokenTokenizer(small_encoding()),
}


def all_of(ids: np.ndarray) -> EvalSet:
    """As few sequences as cover all tokens but the first."""
    block = next(size for size in range(8, 0, -1) if (len(ids) - 1) % size == 0)
    return EvalSet(split_of(ids, block), batches=1000, batch_size=16)


def test_mean_loss_of_uniform_predictions_is_log_v():
    model = build(tie_weights=False, pad_vocab_size_to=64)
    nn.init.zeros_(model.lm_head.weight)
    assert mean_loss(random_sequences(13, batch_size=6), model) == pytest.approx(math.log(31), rel=1e-6)


@pytest.mark.parametrize("tokenizer", LOSSLESS.values(), ids=LOSSLESS)
def test_bytes_per_token_leaves_out_the_first_token(tokenizer):
    ids = tokenizer.encode(TEXT)
    size = len(TEXT.encode()) - len(tokenizer.decode_bytes(ids[:1].tolist()))
    assert all_of(ids).bytes_per_token(tokenizer) == size / (len(ids) - 1)


@pytest.mark.parametrize("tokenizer", LOSSLESS.values(), ids=LOSSLESS)
def test_text_bytes_counts_utf8(tokenizer):
    assert tokenizers.text_bytes(tokenizer, tokenizer.encode(TEXT)) == len(TEXT.encode()) > len(TEXT)
    assert tokenizers.text_bytes(tokenizer, tokenizer.encode("ü東\U0001f600")) == 2 + 3 + 4
    assert tokenizers.text_bytes(tokenizer, tokenizer.encode("")) == 0
    assert tokenizers.text_bytes(ByteTokenizer(), ByteTokenizer().encode("東京")[1:5]) == 4  # parts of characters


@pytest.mark.parametrize("name", ["char with an end", "byte", "tiktoken"])
def test_end_of_text_is_a_target_without_bytes(name: str):
    tokenizer = LOSSLESS[name]
    ids, end = tokenizer.encode("the thing"), [tokenizer.end_of_text]
    with_ends = np.concatenate((end, ids, end, end, ids, end)).astype(np.int64)
    assert tokenizers.text_bytes(tokenizer, with_ends) == 2 * len("the thing")
    assert all_of(with_ends).bytes_per_token(tokenizer) == 2 * len("the thing") / (len(with_ends) - 1)


def test_word_tokenizer_has_no_bytes_per_token():
    tokenizer = WordTokenizer.of_documents([TEXT])
    ids = tokenizer.encode(TEXT)
    assert tokenizers.text_bytes(tokenizer, ids) is None
    assert all_of(ids).bytes_per_token(tokenizer) is None
