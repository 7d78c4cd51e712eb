"""Keys and values of the tokens that a model has seen, so that generation computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Static memory for the keys and values of every layer.

    Tokens come in pieces of any length. As prompts are read, these stand at the same places in all sequences; once
    `part` has told how long each sequence is, each has places of its own. Then the host need not know the lengths: they
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
        self._rows: Tensor | None = None  # [B, 1]
        self._places: Tensor | None = None
        self._seen: Tensor | None = None

    def part(self, lengths: Tensor) -> None:
        """Go on with sequences of different lengths.

        Args:
            lengths: [B] int64, how many of the tokens that are in the cache belong to each sequence.
        """
        self.lengths = lengths.clone()
        self._rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        self._places = self._seen = None

    def rewind(self, lengths: Tensor) -> None:
        """Go on after the first `lengths` [B] tokens of each sequence; what is behind them will be overwritten.

        Raises:
            ValueError: the sequences have not parted.
        """
        if self.lengths is None:
            raise ValueError("sequences are rewound once they have parted; call part() first")
        self.lengths.copy_(lengths)  # in its place, where CUDA graphs read it
        self._places = self._seen = None

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Where the next `tokens` of each sequence stand in it: [tokens], or [B, tokens] once sequences have parted."""
        if self.lengths is None:
            return torch.arange(self.length, self.length + tokens, device=device)
        if self._places is None:
            self._places = self.lengths[:, None]
            if tokens > 1:
                self._places = self._places + torch.arange(tokens, device=device)
        return self._places

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
        if self.lengths is None:
            for whole, new in zip(memory, (k, v), strict=True):
                whole[:, :, self.length : end] = new
            return memory
        places = self.positions(k.shape[2], k.device)  # [B, T]
        if len(k) == 1:  # which takes half the time
            places = places[0]
            for whole, new in zip(memory, (k, v), strict=True):
                whole.index_copy_(2, places, new)
            return memory
        for whole, new in zip(memory, (k, v), strict=True):
            whole[self._rows, :, places] = new.transpose(1, 2)  # [B, T, H, D]
        return memory

    def seen(self, tokens: int, like: Tensor) -> Tensor:
        """How many keys each sequence has with its new `tokens`, [B] int32 on the device of `like` [B, ...].

        Made once for all layers: a launch for each would take longer than the attention of a short sequence.
        """
        if self._seen is None:
            if self.lengths is None:
                self._seen = like.new_full((like.shape[0],), self.length + tokens, dtype=torch.int32)
            else:
                self._seen = (self.lengths + tokens).to(torch.int32)
        return self._seen

    def advance(self, tokens: int) -> None:
        """Count the new tokens as seen, once every layer has them."""
        if self.lengths is None:
            self.length += tokens
        else:
            self.lengths += tokens
        self._places = self._seen = None

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
                self._rows = torch.arange(len(rows), device=rows.device)[:, None]
            self.lengths = selected(self.lengths, rows)
        self._places = self._seen = None

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
        self.lengths = self._rows = self._places = self._seen = None


def selected(whole: Tensor, rows: Tensor) -> Tensor:
    """Rows [B'] of a tensor [B, ...]; in its place where they are as many, for CUDA graphs that read there."""
    found = whole.index_select(0, rows)
    return whole.copy_(found) if len(found) == len(whole) else found
