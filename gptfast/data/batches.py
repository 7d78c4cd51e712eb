"""Batches of token ids, each a pure function of the seed and the step."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptfast.data import shards
from gptfast.data.shards import Tokens


@dataclass(frozen=True)
class Split:
    """One part of a tokenized text, from which sequences of `block_size` tokens and their successors are cut.

    Args:
        tokens: at least block_size + 1.
        block_size: tokens per sequence.
    """

    tokens: Tokens
    block_size: int

    def random_batch(
        self, batch_size: int, seed: int, step: int, rank: int = 0, ranks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Sequences [B, T] int64 in random order, and the tokens that follow.

        A pure function of its arguments: it needs no state to resume. An epoch visits every block of the split once, in
        an order and from an offset of its own, and the next one begins where it ends, in the midst of a batch.

        Args:
            batch_size: sequences of a step, all ranks together.
            seed: of the order.
            step: which batch.
            rank: which of `ranks` equal parts of the batch this process takes.
            ranks: how many parts there are. Together they are the same batch, whatever their number.
        """
        share = batch_size // ranks
        first = step * batch_size + rank * share
        return self._cut(self._places(np.arange(first, first + share), seed))

    def _places(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """Where the sequences of these numbers, counted from the first step on, begin."""
        spare = len(self.tokens) - 1  # the last token follows the last sequence
        blocks = max(1, spare // self.block_size - 1)  # one less than fits, so that they can begin anywhere
        epochs, order = np.divmod(numbers, blocks)
        places = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            offset = np.random.default_rng((seed, epoch, 1)).integers(spare - blocks * self.block_size + 1)
            places[chosen] = _permutation(seed, epoch, blocks)[order[chosen]] * self.block_size + offset
        return places

    def even_batches(self, batches: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """At most `batches` batches of sequences spread evenly over the split: what evaluation measures every time."""
        sequences = min(batches * batch_size, (len(self.tokens) - 1) // self.block_size)
        starts = np.linspace(0, len(self.tokens) - self.block_size - 1, num=sequences).astype(np.int64)
        return [self._cut(starts[i : i + batch_size]) for i in range(0, sequences, batch_size)]

    def some(self) -> np.ndarray:
        """Token ids from places spread evenly over the split, [64, at most 1024]."""
        length = min(1024, len(self.tokens))
        starts = np.linspace(0, len(self.tokens) - length, num=64).astype(np.int64)
        return self.tokens.windows(starts, length)

    def fingerprint(self) -> str:
        """A short text that another split would hardly have: of the number of tokens, and some of them throughout."""
        digest = hashlib.sha256(str(len(self.tokens)).encode())
        digest.update(self.some().astype("<i8").tobytes())
        return f"{len(self.tokens)} tokens, {digest.hexdigest()[:16]}"

    def _cut(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(self.tokens.windows(starts, self.block_size + 1))  # [B, T + 1]
        return windows[:, :-1], windows[:, 1:]


class Ahead:
    """Batches one after the other, each of which a thread computes while the one before is trained on.

    Args:
        batch: gives that of a step.
        first: step.
        end: the step before which they end.

    Attributes:
        waited: seconds, in all, that `next` had to wait.
    """

    def __init__(self, batch: Callable[[int], tuple[Tensor, Tensor]], first: int, end: int) -> None:
        self._batch, self._step, self._end = batch, first, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._thread.submit(batch, first)
        self.waited = 0.0

    def next(self) -> tuple[Tensor, Tensor]:
        """That of the next step."""
        started = time.perf_counter()
        found = self._next.result()
        self.waited += time.perf_counter() - started
        self._step += 1
        if self._step < self._end:
            self._next = self._thread.submit(self._batch, self._step)
        return found

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def prepared(folder: Path, block_size: int) -> tuple[Split, Split]:
    """Training and validation split of a folder of token shards, see `gptfast.data.shards`.

    Raises:
        ValueError: shards that are not there or damaged, or a split that is shorter than one block.
    """
    train, val = (Split(shards.open_split(folder, name), block_size) for name in shards.SPLITS)
    for name, part in (("train", train), ("val", val)):
        if len(part.tokens) <= block_size:
            raise ValueError(
                f"{folder} has {len(part.tokens)} tokens for {name}, more than block_size={block_size} are needed"
            )
    return train, val


def split(tokens: np.ndarray, block_size: int, held_out: float) -> tuple[Split, Split]:
    """Training split and held-out split: the first tokens and the last `held_out` of them, as nanoGPT divides.

    With `held_out` 0 both are one and the same split, of all tokens: a text of a few sentences has no part to spare.

    Raises:
        ValueError: either part is shorter than one block and the token after it.
    """
    if held_out == 0.0:
        if len(tokens) <= block_size:
            raise ValueError(
                f"the text is too short: {len(tokens)} tokens, more than block_size={block_size} are needed; give a "
                "longer text or a smaller block size"
            )
        whole = Split(Tokens([tokens]), block_size)
        return whole, whole
    boundary = int(len(tokens) * (1.0 - held_out))
    parts = tokens[:boundary], tokens[boundary:]
    if min(len(part) for part in parts) <= block_size:
        raise ValueError(
            f"the text is too short: {len(tokens)} tokens make {len(parts[0])} to train on and {len(parts[1])} held "
            f"out, each must be more than block_size={block_size}; give a longer text or a smaller block size, or hold "
            "out nothing with --held-out 0"
        )
    return Split(Tokens([parts[0]]), block_size), Split(Tokens([parts[1]]), block_size)
