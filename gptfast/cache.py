"""Keys and values of the tokens that a model has seen, so that generation computes each token once."""

from __future__ import annotations

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

    def advance(self, tokens: int) -> None:
        """Count the new tokens as seen, once every layer has them."""
        self.length += tokens

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
