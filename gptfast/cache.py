"""Keys and values of the tokens that a model has seen, so that generation computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Static memory for the keys and values of every layer, filled from the left.

    Args:
        n_layer: layers of the model.
        capacity: S, how many tokens fit.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0  # tokens that are in it; moved on by `advance`, when all layers have theirs
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer
        self._seen: Tensor | None = None

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values [B, H, T, D] of T new tokens to a layer.

        Returns:
            The keys and values of the layer, [B, H, S, D] each, of which the first `length` + T are there.

        Raises:
            ValueError: they do not fit.
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache for {self.capacity}")
        memory = self._layers[layer]
        if memory is None:
            batch, heads, _, head_size = k.shape
            # rows of one head side by side: decoding reads them one after another
            shape = (batch, heads, self.capacity, head_size)
            memory = (k.new_empty(shape), v.new_empty(shape))
            self._layers[layer] = memory
        for whole, new in zip(memory, (k, v), strict=True):
            whole[:, :, self.length : end] = new
        return memory

    def seen(self, tokens: int, like: Tensor) -> Tensor:
        """How many keys each sequence has with its new `tokens`, [B] int32 on the device of `like` [B, ...].

        Made once for all layers: a launch for each would take longer than the attention of a short sequence.
        """
        if self._seen is None:
            self._seen = like.new_full((like.shape[0],), self.length + tokens, dtype=torch.int32)
        return self._seen

    def advance(self, tokens: int) -> None:
        """Count the new tokens as seen, once every layer has them."""
        self.length += tokens
        self._seen = None

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
        self._seen = None
