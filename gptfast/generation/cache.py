"""Keys and values of the tokens that a model has seen, so that generation computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Static memory for the keys and values of every layer.

    Tokens come in pieces: of any length, the same for all sequences, as prompts are read; and once `part` has told how
    long each sequence is, one for each sequence, at a place of its own. Then the host need not know the lengths: they
    are a tensor, which a CUDA graph reads anew at each replay.

    Args:
        n_layer: layers of the model.
        capacity: S, how many tokens of a sequence fit.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens of each sequence that are in it, until they part; moved on by `advance`
        self.lengths: Tensor | None = None  # [B] int64, once they have parted
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer
        self._rows: Tensor | None = None
        self._seen: Tensor | None = None

    def part(self, lengths: Tensor) -> None:
        """Go on with sequences of different lengths.

        Args:
            lengths: [B] int64, how many of the tokens that are in the cache belong to each sequence.
        """
        self.lengths = lengths.clone()
        self._rows = torch.arange(len(lengths), device=lengths.device)
        self._seen = None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Where the next `tokens` of each sequence stand in it: [tokens], or [B, 1] once sequences have parted."""
        if self.lengths is not None:
            return self.lengths[:, None]
        return torch.arange(self.length, self.length + tokens, device=device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values [B, H, T, D] of T new tokens to a layer.

        Returns:
            The keys and values of the layer, [B, H, S, D] each.

        Raises:
            ValueError: they do not fit.
        """
        end = self.length + k.shape[2]
        if self.lengths is None and end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache for {self.capacity}")
        memory = self._layers[layer]
        if memory is None:
            batch, heads, _, head_size = k.shape
            # rows of one head side by side: decoding reads them one after another
            shape = (batch, heads, self.capacity, head_size)
            # zeros: what is masked is multiplied with 0, and memory that was never written may hold NaN
            memory = (k.new_zeros(shape), v.new_zeros(shape))
            self._layers[layer] = memory
        for whole, new in zip(memory, (k, v), strict=True):
            if self.lengths is None:
                whole[:, :, self.length : end] = new
            else:
                whole[self._rows, :, self.lengths] = new[:, :, 0]
        return memory

    def seen(self, like: Tensor) -> Tensor:
        """How many keys each sequence has with its new token, [B] int32 on the device of `like` [B, ...].

        Made once for all layers: a launch for each would take longer than the attention of a short sequence.
        """
        if self._seen is None:
            if self.lengths is None:
                self._seen = like.new_full((like.shape[0],), self.length + 1, dtype=torch.int32)
            else:
                self._seen = (self.lengths + 1).to(torch.int32)
        return self._seen

    def advance(self, tokens: int) -> None:
        """Count the new tokens as seen, once every layer has them."""
        if self.lengths is None:
            self.length += tokens
        else:
            self.lengths += tokens
        self._seen = None

    def shorten(self, length: int) -> None:
        """Forget the tokens of each sequence beyond its first `length`, which may not have parted.

        Raises:
            ValueError: there are fewer, or the sequences have parted.
        """
        if self.lengths is not None:
            raise ValueError("sequences of different lengths cannot be shortened to one length")
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be from 0 to {self.length}, got {length}")
        self.length, self._seen = length, None

    def select(self, rows: Tensor) -> None:
        """Go on with some of the sequences, in another order or several times.

        Args:
            rows: [B'] int64: sequence i is from now on what sequence rows[i] was.
        """
        for layer, memory in enumerate(self._layers):
            if memory is not None:
                k, v = (selected(whole, rows) for whole in memory)
                self._layers[layer] = k, v
        if self.lengths is not None:
            if len(rows) != len(self.lengths):  # else they are where CUDA graphs read them
                self._rows = torch.arange(len(rows), device=rows.device)
            self.lengths = selected(self.lengths, rows)
        self._seen = None

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
        self.lengths = self._rows = self._seen = None


def selected(whole: Tensor, rows: Tensor) -> Tensor:
    """Rows [B'] of a tensor [B, ...]; in its place where they are as many, for CUDA graphs that read there."""
    found = whole.index_select(0, rows)
    return whole.copy_(found) if len(found) == len(whole) else found
