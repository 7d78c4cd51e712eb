"""Token by token: prompts go through the model once, then each new token alone, with keys and values kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.cuda_graphs import CUDAGraphCallable
from gptfast.generation.kv_cache import KVCache, selected
from gptfast.quantization import for_decoding

CHUNK = 512  # tokens of the prompts that go through the model together
Outcome = TypeVar("Outcome", covariant=True)


class CausalLM(Protocol):
    """The interface of a model that generation calls; `gptfast.GPT` has it."""

    training: bool

    @property
    def config(self) -> GPTConfig:
        """The model's shape: `block_size`, `n_layer` and `vocab_size` are read."""

    @property
    def transformer(self) -> Callable[[Tensor, KVCache], Tensor]:
        """Maps tokens [B, T] int64 after those of a cache to hidden states [B, T, C], and adds them to the cache."""

    def logits(self, x: Tensor) -> Tensor:
        """Map hidden states [..., C] to logits [..., V]."""

    def require_tokens(self, idx: Tensor) -> None:
        """Raise ValueError for token ids out of range."""

    def parameters(self) -> Iterator[Tensor]:
        """The model's weights."""

    def train(self, mode: bool = True) -> Any:
        """Set the training mode."""

    def eval(self) -> Any:
        """Set the evaluation mode."""


def device_of(model: CausalLM) -> torch.device:
    """Device of a model's weights."""
    return next(iter(model.parameters())).device


class Choice(Protocol[Outcome]):
    """What is made of logits, on the device: part of a step, of its graph, and of what is compiled of it."""

    @property
    def generator(self) -> torch.Generator | None:
        """What `noise` draws from, for graphs to know."""

    def noise(self, logits: Sequence[int], device: torch.device) -> Tensor | None:
        """Random numbers for logits of a shape [B, V]; compiled code cannot draw them from a generator."""

    def __call__(self, logits: Tensor, noise: Tensor | None, decoder: CachedDecoder) -> Outcome:
        """What comes of logits [B, V] that follow the decoder's tokens."""


class Logits:
    """The logits themselves, [B, V]."""

    generator = None

    def noise(self, logits: Sequence[int], device: torch.device) -> None:
        """None is needed."""

    def __call__(self, logits: Tensor, noise: Tensor | None, decoder: CachedDecoder) -> Tensor:
        """The logits."""
        return logits


class CachedDecoder(Generic[Outcome]):
    """Sequences that grow by one token at a time, and what is made of the logits of what follows them.

    Sequences may differ in length. Until one is longer than the model's window each token is computed once; from then
    on every step reads the last `block_size` tokens of each anew, as a model without a cache does, because positions
    are counted from the window's start.

    Args:
        model: in evaluation mode; called without gradients.
        idx: [B, T] int64 prompts, padded at their ends.
        lengths: how many tokens of each there are, at least 1.
        max_new_tokens: the most that will be added to each.
        choice: what is made of the logits.
        graph: replay a step from a CUDA graph, captured once for each number of sequences; by default on GPUs.
        compiled: put a step through torch.compile, as one graph.
        prompts: how many of `lengths` are the prompt's, of sequences that go on; all by default.

    Attributes:
        tokens: [B, T] int64, all of each sequence so far, padded at their ends.
        ends: [B] int64, how many they are.
        prompts: [B] int64, how many of them are the prompt's.
    """

    def __init__(
        self,
        model: CausalLM,
        idx: Tensor,
        lengths: Sequence[int],
        max_new_tokens: int,
        choice: Choice[Outcome],
        graph: bool | None = None,
        compiled: bool = False,
        prompts: Sequence[int] | None = None,
    ) -> None:
        # the compiler packs weights itself, and knows nothing of those that are packed
        self._model = model if compiled else for_decoding(model, max_new_tokens)
        self._window, self._choice = model.config.block_size, choice
        graph = idx.is_cuda if graph is None else graph
        # each sequence has a length of its own then, on the device: one that the host counts is another graph each time
        self._apart = graph or compiled
        self._next = torch.compile(self._add, fullgraph=True) if compiled else self._add
        self._replayed = CUDAGraphCallable(self._step, choice.generator) if graph else None
        longest = max(lengths, default=0)
        self.tokens = idx.new_zeros(idx.shape[0], longest + max_new_tokens)
        self.tokens[:, :longest] = idx[:, :longest]
        self._lengths = list(lengths)
        self.ends = torch.tensor(self._lengths, device=idx.device)
        self.prompts = torch.tensor(self._lengths if prompts is None else list(prompts), device=idx.device)
        self._cache = KVCache(model.config.n_layer, min(self._window, longest + max_new_tokens))

    def prefill(self) -> Outcome:
        """What follows the sequences, all of whose tokens are read."""
        logits = self._read()
        return self._choice(logits, self._noise(len(logits)), self)

    def _read(self) -> Tensor:
        """The logits [B, V] that follow the last `block_size` tokens of each sequence."""
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
        if len(set(kept)) > 1 or self._apart:
            self._cache.part(last + 1)
        return self._model.logits(hidden)

    def step(self, tokens: Tensor) -> Outcome:
        """Add a token to each sequence, [B] int64; what follows. With a graph the next step overwrites it."""
        self._lengths = [length + 1 for length in self._lengths]
        if max(self._lengths) > self._window:
            self._append(tokens)
            return self.prefill()
        return self._step(tokens) if self._replayed is None else self._replayed(tokens)

    def _step(self, tokens: Tensor) -> Outcome:
        return self._next(tokens, self._noise(len(tokens)))

    def _add(self, tokens: Tensor, noise: Tensor | None) -> Outcome:
        self._append(tokens)
        x = self._model.transformer(tokens[:, None], self._cache)  # [B, 1, C]
        return self._choice(self._model.logits(x[:, 0]), noise, self)

    def _append(self, tokens: Tensor) -> None:
        self.tokens.scatter_(1, self.ends[:, None], tokens[:, None])
        self.ends += 1

    def _noise(self, rows: int) -> Tensor | None:
        return self._choice.noise((rows, self._model.config.vocab_size), self.tokens.device)

    def pays(self, remaining: int) -> bool:
        """Whether to `select` the `remaining` sequences when others have ended.

        A graph is captured for each number of sequences, which takes as long as hundreds of steps: half of them must
        have ended then, or one may be there that is longer than the window, for which all would be read anew.
        """
        return self._replayed is None or 2 * remaining <= len(self._lengths) or max(self._lengths) >= self._window

    def select(self, rows: Tensor) -> None:
        """Go on with some of the sequences, in another order or several times: i is from now on what rows[i] was."""
        if self._replayed is not None and len(rows) != len(self._lengths):
            self._replayed.reset()  # another number of sequences is another graph
        if len(set(self._lengths)) > 1:
            self._lengths = [self._lengths[row] for row in rows.tolist()]
        else:
            self._lengths = self._lengths[:1] * len(rows)
        self.tokens, self.ends, self.prompts = (
            selected(whole, rows) for whole in (self.tokens, self.ends, self.prompts)
        )
        self._cache.select(rows)
