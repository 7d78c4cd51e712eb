"""Token by token: what the model expects next, a draw from it, and which sequences go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gptfast.generation import sampling
from gptfast.generation.decoding import CachedDecoder
from gptfast.generation.sampling import Sampling

if TYPE_CHECKING:
    from gptfast.model import GPT


class Step(NamedTuple):
    """One token more of those sequences that go on."""

    rows: list[int]  # the places of the sequences in the batch
    tokens: list[int]
    log_probs: list[float]  # none unless they were asked for


@torch.no_grad()
def steps(
    model: GPT,
    idx: Tensor,
    lengths: Sequence[int],
    max_new_tokens: int,
    settings: Sampling | None = None,
    ends: Callable[[int, int], bool] = lambda row, token: False,
    generator: torch.Generator | None = None,
    log_probs: bool = True,
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
    """
    chosen = settings or Sampling()
    check(model, idx, lengths, max_new_tokens)
    if max_new_tokens == 0 or len(idx) == 0:
        return
    rows = list(range(len(idx)))
    with evaluating(model):
        decoder = CachedDecoder(model, idx, lengths, max_new_tokens)
        prompts = torch.tensor(lengths, device=idx.device)
        logits = decoder.prefill()
        for number in range(max_new_tokens):
            if not logits.is_cuda:
                sampling.check(logits)
            drawn = _draw(logits, decoder, prompts, chosen, generator)
            tokens = drawn.tolist()
            yield Step(rows, tokens, _log_probs(logits, drawn).tolist() if log_probs else [])
            going = [place for place, (row, token) in enumerate(zip(rows, tokens, strict=True)) if not ends(row, token)]
            if not going or number == max_new_tokens - 1:
                return
            if len(going) < len(rows):
                kept = torch.tensor(going, device=idx.device)
                decoder.select(kept)
                rows, drawn, prompts = [rows[place] for place in going], drawn[kept], prompts[kept]
            logits = decoder.step(drawn)


def _log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Those of `tokens` [B], by logits [B, V]."""
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def _draw(
    logits: Tensor, decoder: CachedDecoder, prompts: Tensor, chosen: Sampling, generator: torch.Generator | None
) -> Tensor:
    """The next token of each sequence, [B] int64."""
    tokens, ends = decoder.tokens, decoder.ends
    logits = sampling.penalize(logits.float(), tokens, ends, prompts, chosen)
    if chosen.no_repeat_ngram_size:
        logits = sampling.block_ngrams(logits, tokens, ends, chosen.no_repeat_ngram_size)
    return sampling.draw(logits, chosen, generator)


def check(model: GPT, idx: Tensor, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raise ValueError for prompts or a number of tokens that cannot be; arguments as those of `steps`."""
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"idx must be [B, T] with T >= 1, got shape {tuple(idx.shape)}")
    if len(lengths) != len(idx) or not all(1 <= length <= idx.shape[1] for length in lengths):
        raise ValueError(f"lengths must be {len(idx)} numbers from 1 to {idx.shape[1]}, got {list(lengths)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    model.require_tokens(idx)


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards it is in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
