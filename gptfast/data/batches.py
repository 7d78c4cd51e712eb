"""Batches of token ids: pure functions of the seed and the step, so resuming needs no data state."""

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
    """Training or validation part of a tokenized text, cut into sequences of `block_size` tokens.

    Args:
        tokens: at least block_size + 1 token ids.
        block_size: tokens per sequence T.
    """

    tokens: Tokens
    block_size: int

    def random_batch(
        self, batch_size: int, seed: int, step: int, rank: int = 0, ranks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Draw the batch of a step: token ids and their successors, each [B, T] int64.

        An epoch visits every block of the split once, in a random order and from a random offset. An epoch may end in
        the middle of a batch. The batch does not depend on the number of ranks.

        Args:
            batch_size: sequences per step, summed over all ranks.
            seed: seed of the order.
            step: index of the batch.
            rank: rank of this process, which takes rows rank * B to (rank + 1) * B of the batch.
            ranks: number of processes; B = batch_size // ranks.
        """
        share = batch_size // ranks
        first = step * batch_size + rank * share
        return self._cut(self._places(np.arange(first, first + share), seed))

    def _places(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """Compute the start offsets of sequences, which are numbered from the first step on."""
        spare = len(self.tokens) - 1  # the last token is a target only
        blocks = max(1, spare // self.block_size - 1)  # one less than fits leaves room for the random offset
        epochs, order = np.divmod(numbers, blocks)
        places = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            offset = np.random.default_rng((seed, epoch, 1)).integers(spare - blocks * self.block_size + 1)
            places[chosen] = _permutation(seed, epoch, blocks)[order[chosen]] * self.block_size + offset
        return places

    def eval_batches(self, batches: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """Return at most `batches` batches of sequences, evenly spaced over the split and always the same."""
        sequences = min(batches * batch_size, (len(self.tokens) - 1) // self.block_size)
        starts = np.linspace(0, len(self.tokens) - self.block_size - 1, num=sequences).astype(np.int64)
        return [self._cut(starts[i : i + batch_size]) for i in range(0, sequences, batch_size)]

    def probe(self) -> np.ndarray:
        """Sample token ids evenly over the split, [64, at most 1024]."""
        length = min(1024, len(self.tokens))
        starts = np.linspace(0, len(self.tokens) - length, num=64).astype(np.int64)
        return self.tokens.windows(starts, length)

    def fingerprint(self) -> str:
        """Number of tokens and a hash of `probe`, to recognise the split when a run resumes."""
        digest = hashlib.sha256(str(len(self.tokens)).encode())
        digest.update(self.probe().astype("<i8").tobytes())
        return f"{len(self.tokens)} tokens, {digest.hexdigest()[:16]}"

    def _cut(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(self.tokens.windows(starts, self.block_size + 1))  # [B, T + 1]
        return windows[:, :-1], windows[:, 1:]


class Prefetcher:
    """Prefetch the next batch in a thread.

    Args:
        batch: computes the batch of a step.
        first: first step.
        end: one past the last step.

    Attributes:
        waited: total seconds that `next` has blocked.
    """

    def __init__(self, batch: Callable[[int], tuple[Tensor, Tensor]], first: int, end: int) -> None:
        self._batch, self._step, self._end = batch, first, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._thread.submit(batch, first)
        self.waited = 0.0

    def next(self) -> tuple[Tensor, Tensor]:
        """Return the batch of the next step."""
        started = time.perf_counter()
        batch = self._next.result()
        self.waited += time.perf_counter() - started
        self._step += 1
        if self._step < self._end:
            self._next = self._thread.submit(self._batch, self._step)
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, blocks: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(blocks)


def open_prepared(folder: Path, block_size: int) -> tuple[Split, Split]:
    """Open the training and validation splits of a folder of token shards (see `gptfast.data.shards`).

    Raises:
        ValueError: a shard is missing or damaged, or a split is no longer than one block.
    """
    train, val = (Split(shards.open_split(folder, name), block_size) for name in shards.SPLITS)
    for name, split in zip(shards.SPLITS, (train, val), strict=True):
        count = len(split.tokens)
        if count <= block_size:
            raise ValueError(f"{folder} has {count} tokens for {name}; give more than block_size={block_size}")
    return train, val


def split_tokens(tokens: np.ndarray, block_size: int, held_out: float) -> tuple[Split, Split]:
    """Split tokens into training and validation: the last `held_out` share validates, as in nanoGPT.

    With `held_out` 0 both are the same object and hold all tokens, for texts too short to hold anything out.

    Raises:
        ValueError: a part is no longer than one block.
    """
    boundary = int(len(tokens) * (1.0 - held_out)) if held_out else len(tokens)
    train, val = (Split(Tokens([part]), block_size) for part in (tokens[:boundary], tokens[boundary:]))
    if held_out == 0.0:
        val = train
    if min(len(train.tokens), len(val.tokens)) <= block_size:
        others = f" and {len(tokens) - boundary} held out" if held_out else ""
        advice = ", or hold out nothing with --held-out 0" if held_out else ""
        raise ValueError(
            f"the text is too short: {boundary} tokens to train on{others}, more than block_size={block_size} are "
            f"needed; give a longer text or a smaller block size{advice}"
        )
    return train, val
