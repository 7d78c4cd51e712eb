"""Token by token: what the model expects next, a draw from it, and which sequences go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.generation import sampling
from gptfast.generation.decoder import CachedDecoder, CausalLM
from gptfast.generation.sampling import Sampling


class Step(NamedTuple):
    """One token more of those sequences that go on."""

    rows: list[int]  # the places of the sequences in the batch
    tokens: list[int]
    log_probs: list[float]  # none unless they were asked for


class Drawn(NamedTuple):
    """The tokens of a step on the device, and what the host is told of them."""

    tokens: Tensor  # [B] int64
    told: Tensor  # [3, B] float32, for one copy: tokens (exact to 2**24), their log-probabilities, largest logits


@dataclass(frozen=True)
class Draw:
    """A token drawn for each sequence, as the choice of a decoder.

    Args:
        settings: how.
        generator: what it is drawn from; PyTorch's own if None.
        log_probs: whether log-probabilities were asked for; 0 stands in their place otherwise.
    """

    settings: Sampling
    generator: torch.Generator | None
    log_probs: bool

    def noise(self, logits: Sequence[int], device: torch.device) -> Tensor | None:
        """Exponential random numbers [B, V], of which a greedy draw needs none."""
        if self.settings.temperature == 0.0:
            return None
        return sampling.exponentials(torch.empty(*logits, device=device), self.generator)

    def __call__(self, logits: Tensor, noise: Tensor | None, decoder: CachedDecoder) -> Drawn:
        """One token for each row of the logits [B, V]."""
        left = sampling.process(logits.float(), decoder.tokens, decoder.ends, decoder.prompts, self.settings)
        tokens = sampling.choose(left, noise, self.settings)  # [B]
        largest = logits.amax(-1).float()  # [B], from which the host sees whether there is a distribution at all
        log_probs = log_softmax_of(logits, tokens) if self.log_probs else torch.zeros_like(largest)
        return Drawn(tokens, torch.stack((tokens.float(), log_probs, largest)))


class _Told:
    """A step's `Drawn.told` on its way to the host."""

    def __init__(self, told: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        self._values = told
        if told.is_cuda:
            self._values = torch.empty_like(told, device="cpu", pin_memory=True).copy_(told, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(told.device))

    def read(self, rows: list[int], places: list[int], log_probs: bool) -> Step:
        """What was drawn for sequences at some places of the batch, once it is there.

        Raises:
            ValueError: their logits are no numbers.
        """
        if self._copied is not None:
            self._copied.synchronize()
        tokens, found, largest = ([values[place] for place in places] for values in self._values.tolist())
        sampling.require_finite(largest)
        return Step(rows, [int(token) for token in tokens], found if log_probs else [])


@torch.no_grad()
def steps(
    model: CausalLM,
    idx: Tensor,
    lengths: Sequence[int],
    max_new_tokens: int,
    settings: Sampling | None = None,
    ends: Callable[[int, int], bool] = lambda row, token: False,
    generator: torch.Generator | None = None,
    log_probs: bool = True,
    compiled: bool = False,
    ahead: bool | None = None,
    prompts: Sequence[int] | None = None,
) -> Iterator[Step]:
    """The tokens of `continuations`, as they come. Sequences that have ended leave the batch.

    Args:
        model: the GPT.
        idx: as `continuations`.
        lengths: as `continuations`.
        max_new_tokens: as `continuations`.
        settings: as `continuations`.
        ends: whether a token ends the sequence at a place of the batch; called for each, after the step was given out.
        generator: as `continuations`.
        log_probs: as `continuations`.
        compiled: as `continuations`.
        ahead: have the device begin with a step before the host has read the one before it, by default on GPUs: the
            device never waits then, and a sequence that has ended takes part in one step more, which nobody sees.
        prompts: how many of `lengths` are the prompt's, of sequences that go on; all by default.
    """
    check(model, idx, lengths, max_new_tokens)
    if max_new_tokens == 0 or len(idx) == 0:
        return
    ahead = idx.is_cuda if ahead is None else ahead
    rows = list(range(len(idx)))  # of the decoder's sequences, which are these
    live = rows  # places in `rows` of those that go on
    with evaluating(model):
        draw = Draw(settings or Sampling(), generator, log_probs)
        decoder = CachedDecoder(model, idx, lengths, max_new_tokens, draw, compiled=compiled, prompts=prompts)
        drawn = decoder.prefill()
        for number in range(max_new_tokens):
            last = number == max_new_tokens - 1
            told, following = _Told(drawn.told), drawn
            if ahead and not last:
                following = decoder.step(drawn.tokens)
            step = told.read([rows[place] for place in live], live, log_probs)
            yield step
            live = [place for place, row, token in zip(live, *step[:2], strict=True) if not ends(row, token)]
            if last or not live:
                return
            if len(live) < len(rows) and decoder.pays(len(live)):
                kept = torch.tensor(live, device=idx.device)
                decoder.select(kept)
                rows, live = [rows[place] for place in live], list(range(len(live)))
                following = Drawn(following.tokens[kept], following.told[:, kept])
            drawn = following if ahead else decoder.step(following.tokens)


def log_softmax_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B] float32 of `tokens` [B] int64, by logits [B, V]."""
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def check(model: CausalLM, idx: Tensor, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raise ValueError for prompts or a number of tokens that cannot be; arguments as those of `steps`."""
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"idx must be [B, T] with T >= 1, got shape {tuple(idx.shape)}")
    if len(lengths) != len(idx) or not all(1 <= length <= idx.shape[1] for length in lengths):
        raise ValueError(f"lengths must be {len(idx)} numbers from 1 to {idx.shape[1]}, got {list(lengths)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    model.require_tokens(idx)


@contextmanager
def evaluating(model: CausalLM) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards it is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
