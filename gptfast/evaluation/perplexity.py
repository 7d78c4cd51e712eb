"""Perplexity and bits per byte of a text, by sliding windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gptfast import tokenizers
from gptfast.backend import IGNORE_INDEX
from gptfast.checkpoint.atomic_files import read_json
from gptfast.data import corpus, shards
from gptfast.data.shards import Tokens
from gptfast.evaluation import metrics
from gptfast.evaluation.metrics import Estimate
from gptfast.evaluation.token_losses import token_losses
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer


@dataclass(frozen=True)
class Windows:
    """Windows of `block_size` tokens over a text, `stride` tokens apart.

    Each token but the first is predicted once, in the first window that has it as a target. Targets of the first
    window have a context of 1 to block_size tokens, all others of at least block_size - stride + 1. A smaller stride
    gives more context and takes block_size / stride times as long.

    Args:
        tokens: token ids of the text, at least 2.
        block_size: context length of the model.
        stride: from 1 to block_size; windows of stride block_size do not overlap.

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
            raise ValueError(f"the text has {len(self.tokens)} tokens; at least 2 are needed, a context and a target")

    def __len__(self) -> int:
        after_first = max(0, len(self.tokens) - 1 - self.block_size)
        return 1 + -(-after_first // self.stride)

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield token ids and targets, each [B, T] int64. Targets that an earlier window predicts are negative.

        Args:
            batch_size: windows per batch. A last window that is shorter is a batch by itself.
            limit: number of windows; None for all.
        """
        count = len(self) if limit is None else min(len(self), limit)
        has_short = count == len(self) and (count - 1) * self.stride + self.block_size > len(self.tokens) - 1
        full = count - 1 if has_short else count
        for first in range(0, full, batch_size):
            yield self._batch(np.arange(first, min(first + batch_size, full)), self.block_size)
        if has_short:
            yield self._batch(np.array([count - 1]), len(self.tokens) - 1 - (count - 1) * self.stride)

    def _batch(self, numbers: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        tokens = torch.from_numpy(self.tokens.windows(numbers * self.stride, length + 1))  # [B, T + 1]
        targets = tokens[:, 1:].clone()
        targets[torch.from_numpy(numbers > 0), : self.block_size - self.stride] = IGNORE_INDEX
        return tokens[:, :-1], targets


@dataclass(frozen=True)
class TextScore:
    """Perplexity of a text.

    Args:
        loss: nats per token; the standard error treats windows as independent samples.
        bits_per_byte: per byte of UTF-8; None without bytes, and for a word tokenizer, which drops white space.
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes of those tokens, without end-of-text tokens; None for a word tokenizer.
        windows: number of windows.
    """

    loss: Estimate
    bits_per_byte: Estimate | None
    tokens: int
    bytes: int | None
    windows: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss; infinity where it overflows a float."""
        return metrics.perplexity(self.loss.value)

    def fields(self) -> dict[str, Any]:
        """Return the score as JSON fields."""
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "windows": self.windows,
            **metrics.fields("loss", self.loss),
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,  # JSON has no infinity
            **metrics.fields("bits_per_byte", self.bits_per_byte),
        }


def score(
    model: GPT, tokenizer: Tokenizer, windows: Windows, dtype: torch.dtype, batch_size: int, limit: int | None = None
) -> TextScore:
    """Compute loss and bits per byte of a text, summed in float64, with a progress bar on a terminal.

    Args:
        model: the GPT; its mode is restored.
        tokenizer: the model's.
        windows: windows over the text.
        dtype: dtype of matmuls.
        batch_size: windows per forward pass.
        limit: number of windows; None for all.

    Raises:
        ValueError: a token id is out of range.
        RuntimeError: a loss is not finite.
    """
    sums: list[float] = []
    counts: list[int] = []
    n_bytes: int | None = 0
    total = min(len(windows), limit or len(windows))
    with tqdm(total=total, unit="window", dynamic_ncols=True, disable=None, leave=False) as bar:
        for idx, targets in windows.batches(batch_size, limit):
            sums += token_losses(model, idx, targets, dtype).sum(1).tolist()
            counts += (targets >= 0).sum(1).tolist()
            part = tokenizers.text_bytes(tokenizer, targets[targets >= 0].numpy())
            n_bytes = None if n_bytes is None or part is None else n_bytes + part
            bar.update(len(idx))
    loss, tokens = metrics.mean(sums, counts), sum(counts)
    bits_per_byte = loss.scaled(metrics.bits_per_byte(1.0, n_bytes / tokens)) if n_bytes else None
    return TextScore(loss, bits_per_byte, tokens, n_bytes, len(sums))


def load_tokens(source: str, split: str, tokenizer: Tokenizer) -> Tokens:
    """Load the token ids of a text, or of a split of prepared data.

    Args:
        source: a folder of token shards, or a text as for `corpus.load_text`.
        split: "val" or "train" of token shards; a text is loaded whole.
        tokenizer: the model's.

    Raises:
        ValueError: no data, data of another tokenizer, or a text that the tokenizer lacks tokens for.
    """
    folder = Path(source).expanduser()
    if not (folder.is_dir() and shards.is_prepared(folder)):
        return Tokens([tokenizer.encode(corpus.load_text(source))])
    saved = folder / "tokenizer.json"  # nanoGPT writes none
    if saved.is_file() and tokenizers.from_json(read_json(saved)).to_json() != tokenizer.to_json():
        raise ValueError(f"{folder} was prepared with another tokenizer than the model's; prepare it with the model's")
    return shards.open_split(folder, split)
