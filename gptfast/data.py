"""Batches of token ids, each a pure function of the seed and the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """One part of a tokenized text, from which sequences of `block_size` tokens and their successors are cut.

    Args:
        tokens: [N] integer array.
        block_size: tokens per sequence; N must be above it.
    """

    tokens: np.ndarray
    block_size: int

    def random_batch(self, batch_size: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Sequences [B, T] int64 at random places, and the tokens that follow; the same for the same arguments."""
        starts = np.random.default_rng((seed, step)).integers(len(self.tokens) - self.block_size, size=batch_size)
        return self._cut(starts)

    def even_batches(self, batches: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        """At most `batches` batches of sequences spread evenly over the split: what evaluation measures every time."""
        sequences = min(batches * batch_size, (len(self.tokens) - 1) // self.block_size)
        starts = np.linspace(0, len(self.tokens) - self.block_size - 1, num=sequences).astype(np.int64)
        return [self._cut(starts[i : i + batch_size]) for i in range(0, sequences, batch_size)]

    def _cut(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        places = starts[:, None] + np.arange(self.block_size + 1)  # [B, T + 1]
        windows = torch.from_numpy(self.tokens[places].astype(np.int64))
        return windows[:, :-1], windows[:, 1:]


def split(tokens: np.ndarray, block_size: int, held_out: float) -> tuple[Split, Split]:
    """Training split and held-out split: the first tokens and the last `held_out` of them, as nanoGPT divides.

    Raises:
        ValueError: either part is shorter than one block.
    """
    boundary = int(len(tokens) * (1.0 - held_out))
    parts = tokens[:boundary], tokens[boundary:]
    if min(len(part) for part in parts) <= block_size:
        raise ValueError(
            f"the text is too short: {len(tokens)} tokens make {len(parts[0])} to train on and {len(parts[1])} held "
            f"out, each must be more than block_size={block_size}; give a longer text or a smaller block size"
        )
    return Split(parts[0], block_size), Split(parts[1], block_size)
