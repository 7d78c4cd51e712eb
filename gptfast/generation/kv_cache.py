"""KV cache: keys and values of the tokens that a model has read, so that generation computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Static memory for the keys and values of every layer.

    `extend` takes any number of tokens at a time. All sequences have the same `length` until `set_lengths` gives each
    its own. From then on the host need not know them: they are a tensor, which a CUDA graph reads at each replay.

    Args:
        n_layer: layers of the model.
        capacity: S, tokens of a sequence that fit.

    Attributes:
        length: tokens of each sequence in the cache, before `set_lengths`.
        lengths: [B] int64 tokens of each sequence, after `set_lengths`; None before.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.lengths: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer
        self._rows: Tensor | None = None  # [B, 1]
        # computed once for all layers: a launch in each takes longer than the attention of a short sequence
        self._positions: Tensor | None = None
        self._kv_lengths: Tensor | None = None

    def set_lengths(self, lengths: Tensor) -> None:
        """Give each sequence a length of its own.

        Args:
            lengths: [B] int64, how many of the tokens in the cache belong to each sequence.
        """
        self.lengths = lengths.clone()
        self._rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        self._positions = self._kv_lengths = None

    def rewind(self, lengths: Tensor) -> None:
        """Keep the first `lengths` [B] tokens of each sequence; the next tokens overwrite the others.

        Raises:
            ValueError: `set_lengths` was not called before.
        """
        if self.lengths is None:
            raise ValueError("rewind needs a length for each sequence, got one for all; call set_lengths first")
        self.lengths.copy_(lengths)  # in place, where CUDA graphs read it
        self._positions = self._kv_lengths = None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Positions of the next `tokens` tokens: [tokens], or [B, tokens] after `set_lengths`."""
        if self.lengths is None:
            return torch.arange(self.length, self.length + tokens, device=device)
        if self._positions is None:
            self._positions = self.lengths[:, None]
            if tokens > 1:
                self._positions = self._positions + torch.arange(tokens, device=device)
        return self._positions

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values [B, H, T, D] of T new tokens into a layer's memory.

        Returns:
            All keys and values of the layer, [B, H, S, D] each.

        Raises:
            ValueError: the tokens do not fit.
        """
        end = self.length + k.shape[2]
        if self.lengths is None and end > self.capacity:
            raise ValueError(f"the cache has a capacity of {self.capacity} tokens, got {end}")
        memory = self._layers[layer]
        if memory is None:
            batch, heads, _, head_size = k.shape
            # decoding reads the rows of a head one after another
            shape = (batch, heads, self.capacity, head_size)
            # zeros, because masked values are multiplied by 0 and uninitialised memory may hold NaN
            memory = self._layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        positions = None if self.lengths is None else self.positions(k.shape[2], k.device)  # [B, T]
        for whole, new in zip(memory, (k, v), strict=True):
            if positions is None:
                whole[:, :, self.length : end] = new
            elif len(new) == 1:  # twice as fast
                whole.index_copy_(2, positions[0], new)
            else:
                whole[self._rows, :, positions] = new.transpose(1, 2)  # [B, T, H, D]
        return memory

    def kv_lengths(self, tokens: int, like: Tensor) -> Tensor:
        """Keys of each sequence including its `tokens` new ones, [B] int32 on the device of `like` [B, ...]."""
        if self._kv_lengths is None:
            if self.lengths is None:
                self._kv_lengths = like.new_full((like.shape[0],), self.length + tokens, dtype=torch.int32)
            else:
                self._kv_lengths = (self.lengths + tokens).to(torch.int32)
        return self._kv_lengths

    def advance(self, tokens: int) -> None:
        """Count `tokens` new tokens, once every layer has them."""
        if self.lengths is None:
            self.length += tokens
        else:
            self.lengths += tokens
        self._positions = self._kv_lengths = None

    def reorder(self, rows: Tensor) -> None:
        """Make sequence i the one that was rows[i]; rows [B'] int64 may repeat and omit sequences."""
        for layer, memory in enumerate(self._layers):
            if memory is not None:
                k, v = (reordered(whole, rows) for whole in memory)
                self._layers[layer] = k, v
        if self.lengths is not None:
            if len(rows) != len(self.lengths):  # else CUDA graphs read the old tensor, which is the same
                self._rows = torch.arange(len(rows), device=rows.device)[:, None]
            self.lengths = reordered(self.lengths, rows)
        self._positions = self._kv_lengths = None

    def clear(self) -> None:
        """Drop all tokens and keep the memory."""
        self.length = 0
        self.lengths = self._rows = self._positions = self._kv_lengths = None


def reordered(whole: Tensor, rows: Tensor) -> Tensor:
    """Rows [B'] of a tensor [B, ...]; in place when their number stays, because CUDA graphs read that memory."""
    selected = whole.index_select(0, rows)
    return whole.copy_(selected) if len(selected) == len(whole) else selected
