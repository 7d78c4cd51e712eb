"""How well a model predicts a text from its first token to its last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gptfast import tokenizers
from gptfast.backend import IGNORE_INDEX
from gptfast.data.shards import Tokens
from gptfast.evaluation import metrics
from gptfast.evaluation.metrics import Estimate
from gptfast.evaluation.token_losses import losses
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer


@dataclass(frozen=True)
class Windows:
    """A text in windows of `block_size` tokens, each `stride` tokens after the one before.

    Every token but the first, which nothing comes before, is predicted once, in the first window that has it as a
    target. Those of the first window have from 1 to block_size tokens before them, those of all others at least
    block_size - stride + 1: a small stride gives them more to go by and takes block_size / stride as long.

    Args:
        tokens: at least 2.
        block_size: of the model.
        stride: from 1 to block_size, with which windows have no token twice.

    Raises:
        ValueError: too few tokens, or a stride out of range.
    """

    tokens: Tokens
    block_size: int
    stride: int

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.block_size:
            raise ValueError(f"stride must be from 1 to block_size={self.block_size}, got {self.stride}")
        if len(self.tokens) < 2:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, at least 2 are needed: one to predict, and one before it"
            )

    def __len__(self) -> int:
        beyond_the_first = max(0, len(self.tokens) - 1 - self.block_size)
        return 1 + -(-beyond_the_first // self.stride)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids [B, T] int64 and what follows them, less than 0 where an earlier window has predicted it.

        Args:
            batch_size: windows of a batch. The last one of a text is shorter, and a batch of its own.
            limit: so many windows from the first on; all if None.
        """
        number = len(self) if limit is None else min(len(self), limit)
        short = number == len(self) and (number - 1) * self.stride + self.block_size > len(self.tokens) - 1
        whole = number - 1 if short else number
        for first in range(0, whole, batch_size):
            yield self._cut(np.arange(first, min(first + batch_size, whole)), self.block_size)
        if short:
            yield self._cut(np.array([number - 1]), len(self.tokens) - 1 - (number - 1) * self.stride)

    def _cut(self, numbers: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(self.tokens.windows(numbers * self.stride, length + 1))  # [B, T + 1]
        targets = tokens[:, 1:].clone()
        targets[torch.from_numpy(numbers > 0), : self.block_size - self.stride] = IGNORE_INDEX
        return tokens[:, :-1], targets


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Args:
        loss: in nats per token; its standard error is taken over windows, as if these were drawn independently.
        bits_per_byte: what the tokens cost for each byte of UTF-8 they stand for; None of words, which keep no space.
        tokens: that were predicted.
        bytes: that they stand for, ends of documents left out; None of words.
        windows: in which they were.
    """

    loss: Estimate
    bits_per_byte: Estimate | None
    tokens: int
    bytes: int | None
    windows: int

    @property
    def perplexity(self) -> float:
        """Of the loss; infinite where it is too large for a float."""
        return metrics.perplexity(self.loss.value)


def score(
    model: GPT,
    tokenizer: Tokenizer,
    windows: Windows,
    dtype: torch.dtype,
    batch_size: int,
    limit: int | None = None,
    bar: tqdm | None = None,
) -> TextScore:
    """Loss and bits per byte of a text; sums are in float64.

    Args:
        model: left in the mode it was in.
        tokenizer: that the text's tokens are of.
        windows: of the text.
        dtype: of matrix products.
        batch_size: windows that go through the model together.
        limit: so many windows from the first on; all if None.
        bar: of progress, which is moved on by each window.

    Raises:
        ValueError: a token that the model does not have.
        RuntimeError: a loss that is no number.
    """
    sums: list[float] = []
    counts: list[int] = []
    size: int | None = 0
    for idx, targets in windows.batches(batch_size, limit):
        sums += losses(model, idx, targets, dtype).sum(1).tolist()
        counts += (targets >= 0).sum(1).tolist()
        part = tokenizers.text_bytes(tokenizer, targets[targets >= 0].numpy())
        size = None if size is None or part is None else size + part
        if bar is not None:
            bar.update(len(idx))
    loss, tokens = metrics.mean(sums, counts), sum(counts)
    return TextScore(loss, _bits(loss, size / tokens) if size else None, tokens, size, len(sums))


def _bits(loss: Estimate, bytes_per_token: float) -> Estimate:
    stderr = None if loss.stderr is None else metrics.bits_per_byte(loss.stderr, bytes_per_token)
    return Estimate(metrics.bits_per_byte(loss.value, bytes_per_token), stderr)
