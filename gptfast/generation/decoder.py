"""Cached decoding: prompts are prefilled in chunks, then each step reads one new token of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.cuda_graphs import CUDAGraphCallable
from gptfast.generation.kv_cache import KVCache, reordered
from gptfast.generation.model_cache import for_decoding
from gptfast.generation.sampling import Sampling, require_integer

CHUNK = 512  # tokens of the prompts that go through the model together
Outcome = TypeVar("Outcome", covariant=True)


class CausalLM(Protocol):
    """The interface of a model that generation calls; `gptfast.GPT` implements it."""

    training: bool

    @property
    def config(self) -> GPTConfig:
        """The model's shape; `block_size`, `n_layer` and `vocab_size` are read."""

    @property
    def transformer(self) -> Callable[[Tensor, KVCache], Tensor]:
        """Maps tokens [B, T] int64 that follow those of a cache to hidden states [B, T, C], and extends the cache."""

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


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Hold the model in evaluation mode, and restore its mode afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """Prompts and how to continue them.

    Raises:
        ValueError: a shape, length or number of tokens out of range.
    """

    idx: Tensor
    """[B, T] int64 prompts, with any token as padding behind them."""
    lengths: Sequence[int]
    """Tokens of each row before the padding, at least 1."""
    max_new_tokens: int
    """The most tokens to add to each sequence."""
    sampling: Sampling = field(default_factory=Sampling)
    """Settings of the draw of each token."""
    is_finished: Callable[[int, int], bool] = lambda row, token: False
    """True if a token ends the sequence of a row; called once for each token, after the step was yielded."""
    generator: torch.Generator | None = None
    """Source of random numbers, on the device of `idx`; PyTorch's default generator if None."""
    log_probs: bool = True
    """Compute log-probabilities of the tokens."""
    compiled: bool = False
    """Compile the step with `torch.compile` as one graph, which takes a minute for each new shape."""
    prompt_lengths: Sequence[int] | None = None
    """Tokens of `lengths` that are the prompt's, for sequences that continue; all if None."""
    cuda_graph: bool | None = None
    """Replay steps from a CUDA graph, captured once per batch size; on GPUs if None."""
    run_ahead: bool | None = None
    """Launch a step before the host has read the one before, so that the device never waits; on GPUs if None.

    A finished sequence then takes part in one more step, whose token is dropped."""

    def __post_init__(self) -> None:
        if self.idx.dim() != 2 or self.idx.shape[1] == 0:
            raise ValueError(f"idx must be [B, T] with T >= 1, got shape {tuple(self.idx.shape)}")
        rows, longest = self.idx.shape
        if len(self.lengths) != rows or not all(1 <= length <= longest for length in self.lengths):
            raise ValueError(f"lengths must be {rows} numbers from 1 to {longest}, got {list(self.lengths)}")
        require_integer("max_new_tokens", self.max_new_tokens, 0)

    @property
    def uses_cuda_graph(self) -> bool:
        """`cuda_graph` with its default resolved."""
        return self.idx.is_cuda if self.cuda_graph is None else self.cuda_graph

    @property
    def runs_ahead(self) -> bool:
        """`run_ahead` with its default resolved."""
        return self.idx.is_cuda if self.run_ahead is None else self.run_ahead


class LogitsHead(Protocol[Outcome]):
    """Post-processes logits inside the step that is captured or compiled."""

    @property
    def generator(self) -> torch.Generator | None:
        """Source of `noise`, which a CUDA graph must register."""

    def noise(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Random numbers for logits of a shape [B, V]; drawn outside, because compiled code takes no generator."""

    def __call__(self, logits: Tensor, noise: Tensor | None, decoder: CachedDecoder) -> Outcome:
        """Map the logits [B, V] after the decoder's tokens to the step's result."""


class RawLogits:
    """Returns the logits [B, V] themselves."""

    generator = None

    def noise(self, shape: Sequence[int], device: torch.device) -> None:
        """Draw nothing."""

    def __call__(self, logits: Tensor, noise: Tensor | None, decoder: CachedDecoder) -> Tensor:
        """Return the logits."""
        return logits


def prefill_chunks(model: CausalLM, idx: Tensor, cache: KVCache) -> Iterator[tuple[int, Tensor]]:
    """Read prompts [B, T] into the cache; yield the first position and hidden states [B, chunk, C] of each chunk."""
    for start in range(0, idx.shape[1], CHUNK):
        yield start, model.transformer(idx[:, start : start + CHUNK], cache)


class CachedDecoder(Generic[Outcome]):
    """A batch of sequences that grow by one token per step.

    Sequences may differ in length. Each token is computed once until a sequence is longer than the model's window.
    From then on every step reads the last `block_size` tokens of each sequence again, because positions count from the
    window's start.

    Args:
        model: in evaluation mode; called without gradients.
        request: the prompts, `max_new_tokens` and the options of execution are read.
        head: maps logits to the result of a step.

    Attributes:
        tokens: [B, T] int64, each sequence so far, with padding behind it.
        lengths: [B] int64, tokens of each sequence.
        prompt_lengths: [B] int64, how many of them are the prompt's.
    """

    def __init__(self, model: CausalLM, request: GenerationRequest, head: LogitsHead[Outcome]) -> None:
        idx, new = request.idx, request.max_new_tokens
        # the compiler packs weights itself, and cannot read packed ones
        self._model = model if request.compiled else for_decoding(model, new)
        self._window, self._head = model.config.block_size, head
        graph = request.uses_cuda_graph
        # lengths on the device: a length that the host counts would make every step another graph
        self._ragged = graph or request.compiled
        self._add = torch.compile(self._append_and_read, fullgraph=True) if request.compiled else self._append_and_read
        self._replayed = CUDAGraphCallable(self._step, head.generator) if graph else None
        self._host_lengths = list(request.lengths)
        longest = max(self._host_lengths, default=0)
        self.tokens = idx.new_zeros(idx.shape[0], longest + new)
        self.tokens[:, :longest] = idx[:, :longest]
        self.lengths = torch.tensor(self._host_lengths, device=idx.device)
        prompt_lengths = self._host_lengths if request.prompt_lengths is None else list(request.prompt_lengths)
        self.prompt_lengths = torch.tensor(prompt_lengths, device=idx.device)
        self._cache = KVCache(model.config.n_layer, min(self._window, longest + new))

    def prefill(self) -> Outcome:
        """Read the last `block_size` tokens of each sequence and return the head's result after them."""
        starts = [max(0, length - self._window) for length in self._host_lengths]
        kept = [length - start for length, start in zip(self._host_lengths, starts, strict=True)]
        if max(starts, default=0) == 0:
            idx = self.tokens[:, : max(kept, default=0)]
        else:
            columns = torch.arange(max(kept), device=self.tokens.device)
            positions = torch.tensor(starts, device=self.tokens.device)[:, None] + columns  # [B, T]
            idx = self.tokens.gather(1, positions.clamp(max=self.tokens.shape[1] - 1))
        self._cache.clear()
        last = torch.tensor(kept, device=idx.device) - 1  # [B]
        hidden = idx.new_empty(0)  # [B, C], at each sequence's last token
        for start, x in prefill_chunks(self._model, idx, self._cache):
            inside = (last - start).clamp(0, x.shape[1] - 1)
            candidates = x[torch.arange(len(x), device=x.device), inside]  # [B, C]
            # sequences whose last token is in an earlier chunk keep theirs
            hidden = candidates if start == 0 else torch.where((last >= start)[:, None], candidates, hidden)
        if len(set(kept)) > 1 or self._ragged:
            self._cache.set_lengths(last + 1)
        logits = self._model.logits(hidden)
        return self._head(logits, self._noise(len(logits)), self)

    def decode_one_token(self, tokens: Tensor) -> Outcome:
        """Append tokens [B] int64 and return the head's result after them; a CUDA graph's next step overwrites it."""
        self._host_lengths = [length + 1 for length in self._host_lengths]
        if max(self._host_lengths) > self._window:
            self._append(tokens)
            return self.prefill()
        return self._step(tokens) if self._replayed is None else self._replayed(tokens)

    def _step(self, tokens: Tensor) -> Outcome:
        return self._add(tokens, self._noise(len(tokens)))

    def _append_and_read(self, tokens: Tensor, noise: Tensor | None) -> Outcome:
        self._append(tokens)
        x = self._model.transformer(tokens[:, None], self._cache)  # [B, 1, C]
        return self._head(self._model.logits(x[:, 0]), noise, self)

    def _append(self, tokens: Tensor) -> None:
        self.tokens.scatter_(1, self.lengths[:, None], tokens[:, None])
        self.lengths += 1

    def _noise(self, rows: int) -> Tensor | None:
        return self._head.noise((rows, self._model.config.vocab_size), self.tokens.device)

    def should_compact(self, remaining: int) -> bool:
        """True if dropping finished sequences, which leaves `remaining`, is worth recapturing the graph.

        A capture takes as long as hundreds of steps, so half of the sequences must be finished. One that fills the
        window is dropped at once: it would make every step read all windows again.
        """
        if self._replayed is None or 2 * remaining <= len(self._host_lengths):
            return True
        return max(self._host_lengths) >= self._window

    def reorder(self, rows: Tensor) -> None:
        """Make sequence i the one that was rows[i]; rows [B'] int64 may repeat and omit sequences."""
        if self._replayed is not None and len(rows) != len(self._host_lengths):
            self._replayed.reset()  # a graph has one batch size
        if len(set(self._host_lengths)) > 1:
            self._host_lengths = [self._host_lengths[row] for row in rows.tolist()]
        else:  # without a copy from the device
            self._host_lengths = self._host_lengths[:1] * len(rows)
        self.tokens, self.lengths, self.prompt_lengths = (
            reordered(whole, rows) for whole in (self.tokens, self.lengths, self.prompt_lengths)
        )
        self._cache.reorder(rows)
