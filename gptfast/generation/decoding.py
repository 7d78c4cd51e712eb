"""Token by token: prompts go through the model once, then each new token alone, with keys and values kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast import graphs
from gptfast.generation.cache import KVCache

if TYPE_CHECKING:
    from gptfast.model import GPT

CHUNK = 512  # tokens of the prompts that go through the model together
_WARMUP = 2  # steps before a capture


class CachedDecoder:
    """Sequences that grow by one token at a time, and the logits of what follows them.

    Sequences may differ in length. Until one is longer than the model's window each token is computed once; from then
    on every step reads the last `block_size` tokens of each anew, as a model without a cache does, because positions
    are counted from the window's start.

    Args:
        model: in evaluation mode; called without gradients.
        idx: [B, T] int64 prompts, padded at their ends.
        lengths: how many tokens of each are the prompt's, at least 1.
        max_new_tokens: the most that will be added to each.
        graph: replay a step from a CUDA graph, captured once for each number of sequences; by default on GPUs.

    Attributes:
        tokens: [B, T] int64, all of each sequence so far, padded at their ends.
        ends: [B] int64, how many they are.
    """

    def __init__(
        self, model: GPT, idx: Tensor, lengths: Sequence[int], max_new_tokens: int, graph: bool | None = None
    ) -> None:
        self._model, self._window = model, model.config.block_size
        self._graph = idx.is_cuda if graph is None else graph
        self._captured: _Captured | None = None
        self._warm = 0  # steps of this number of sequences that were taken as they are
        longest = max(lengths, default=0)
        self.tokens = idx.new_zeros(idx.shape[0], longest + max_new_tokens)
        self.tokens[:, :longest] = idx[:, :longest]
        self._lengths = list(lengths)
        self.ends = torch.tensor(self._lengths, device=idx.device)
        self._cache = KVCache(model.config.n_layer, min(self._window, longest + max_new_tokens))

    def prefill(self) -> Tensor:
        """The logits [B, V] that follow the sequences, all of whose tokens are read."""
        starts = [max(0, length - self._window) for length in self._lengths]
        kept = [length - start for length, start in zip(self._lengths, starts, strict=True)]
        if max(starts, default=0) == 0:
            idx = self.tokens[:, : max(kept, default=0)]
        else:
            columns = torch.arange(max(kept), device=self.tokens.device)
            places = torch.tensor(starts, device=self.tokens.device)[:, None] + columns  # [B, T]
            idx = self.tokens.gather(1, places.clamp(max=self.tokens.shape[1] - 1))
        self._cache.clear()
        last = torch.tensor(kept, device=idx.device) - 1  # [B]
        hidden = idx.new_empty(0)  # [B, C], at each sequence's last token
        for first in range(0, idx.shape[1], CHUNK):
            x = self._model.transformer(idx[:, first : first + CHUNK], self._cache)  # [B, chunk, C]
            inside = (last - first).clamp(0, x.shape[1] - 1)
            found = x[torch.arange(len(x), device=x.device), inside]  # [B, C]
            # of a sequence that ends before or after this piece it is not the last
            hidden = found if first == 0 else torch.where((last >= first)[:, None], found, hidden)
        if len(set(kept)) > 1 or self._graph:
            self._cache.part(last + 1)
        return self._model.logits(hidden)

    def step(self, tokens: Tensor) -> Tensor:
        """Add a token to each sequence, [B] int64; the logits [B, V] that follow."""
        self.tokens.scatter_(1, self.ends[:, None], tokens[:, None])
        self.ends += 1
        self._lengths = [length + 1 for length in self._lengths]
        if max(self._lengths) > self._window:
            return self.prefill()
        return self._replay(tokens) if self._graph else self._next(tokens)

    def _next(self, tokens: Tensor) -> Tensor:
        x = self._model.transformer(tokens[:, None], self._cache)  # [B, 1, C]
        return self._model.logits(x[:, 0])

    def _replay(self, tokens: Tensor) -> Tensor:
        """`_next` by a graph, once kernels are compiled and memory is there."""
        if self._captured is None:
            self._warm += 1
            if self._warm <= _WARMUP:
                return self._next(tokens)
            self._captured = _capture(self._next, tokens)
        return self._captured.replay(tokens)

    def select(self, rows: Tensor) -> None:
        """Go on with some of the sequences, in another order or several times: i is from now on what rows[i] was."""
        if len(rows) != len(self._lengths):
            self._captured, self._warm = None, 0  # another number of sequences is another graph
        if len(set(self._lengths)) > 1:
            self._lengths = [self._lengths[row] for row in rows.tolist()]
        else:
            self._lengths = self._lengths[:1] * len(rows)
        self.tokens, self.ends = self.tokens.index_select(0, rows), self.ends.index_select(0, rows)
        self._cache.select(rows)


@dataclass
class _Captured:
    """A step's graph, and the tensors at whose addresses it reads and writes."""

    tokens: Tensor  # [B]
    logits: list[Tensor]  # [B, V], one
    run: Callable[[], None]

    def replay(self, tokens: Tensor) -> Tensor:
        """The logits [B, V], which the next replay overwrites."""
        self.tokens.copy_(tokens)
        self.run()
        return self.logits[0]


def _capture(function: Callable[[Tensor], Tensor], tokens: Tensor) -> _Captured:
    static = tokens.clone()
    logits: list[Tensor] = []

    def call() -> None:
        logits[:] = [function(static)]

    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(tokens.device)
    return _Captured(static, logits, graphs.capture(call, pool, stream))
