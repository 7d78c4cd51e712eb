"""Continuing text with a GPT: greedily, by sampling or by beam search, prompts of any lengths together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gptfast.generation import beam_search, sampling, speculative
from gptfast.generation.autoregressive import Step, check, evaluating, steps
from gptfast.generation.decoder import CachedDecoder, CausalLM, Logits
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft


@dataclass
class Continuation:
    """What follows a prompt.

    Args:
        tokens: the new ones; the last is the stop token, if one ended it.
        log_probs: the model's log-probability of each of them, before temperature, penalties and filters.
        finished: a stop token ended it.
    """

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finished: bool = False


def generate(
    model: CausalLM,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    *,
    stop_tokens: Collection[int] = (),
    num_samples: int = 1,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: beam_search.EarlyStopping = False,
    draft: Draft | None = None,
    compiled: bool = False,
    **settings: Any,
) -> Tensor:
    """Continue each row of `idx`; nanoGPT's function, with more to choose from.

    Keys and values are kept, so that each token is computed once, until the window of `block_size` tokens is full and
    moves on with every token: then it is computed anew. Dropout is off while it runs. The model is left in the mode it
    was in.

    Args:
        model: the GPT.
        idx: [B, T] int64 token ids, T >= 1.
        max_new_tokens: tokens to add to each row.
        temperature: divides the logits; any size, down to 0, which takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        generator: makes the sampling repeatable; on the device of `idx`.
        stop_tokens: tokens that end a row, which is filled up with the one that ended it.
        num_samples: continuations of each row, which stand below each other; with beams the best ones, best first.
        num_beams: more than 1 searches for likely continuations and draws nothing; see `search_beams`.
        length_penalty: of the search.
        early_stopping: of the search.
        draft: a smaller model that proposes tokens; see `gptfast.generation.speculative`.
        compiled: as `continuations`.
        settings: the others of `Sampling`.

    Returns:
        [B * num_samples, T + n] int64, n the number of new tokens of the longest continuation.

    Raises:
        ValueError: a setting out of range, settings that contradict each other, or token ids out of range.
    """
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"idx must be [B, T] with T >= 1, got shape {tuple(idx.shape)}")
    chosen = Sampling(temperature=temperature, top_k=top_k, **settings)
    lengths = [idx.shape[1]] * len(idx)
    found: Sequence[Sequence[Continuation | beam_search.Hypothesis]]
    if num_beams == 1:
        found = continuations(
            model, idx, lengths, max_new_tokens, chosen, stop_tokens, num_samples, generator, False, draft, compiled
        )
    elif draft is not None or compiled:
        raise ValueError(f"num_beams={num_beams} excludes a draft and a compiled step: both are for drawing tokens")
    else:
        found = search_beams(
            model, idx, lengths, max_new_tokens, num_beams, length_penalty, early_stopping, stop_tokens, num_samples,
            chosen,
        )  # fmt: skip
    rows = [continuation.tokens for samples in found for continuation in samples]
    longest = max(map(len, rows), default=0)
    new = [row + row[-1:] * (longest - len(row)) for row in rows]
    added = torch.tensor(new, dtype=idx.dtype, device=idx.device).view(len(rows), longest)
    return torch.cat((idx.repeat_interleave(num_samples, dim=0), added), dim=1)


def continuations(
    model: CausalLM,
    idx: Tensor,
    lengths: Sequence[int],
    max_new_tokens: int,
    settings: Sampling | None = None,
    stop_tokens: Collection[int] = (),
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    log_probs: bool = True,
    draft: Draft | None = None,
    compiled: bool = False,
) -> list[list[Continuation]]:
    """Continue prompts of any lengths.

    Args:
        model: the GPT.
        idx: [B, T] int64 token ids, padded at the end with anything that is a token.
        lengths: how many tokens of each row are its prompt, at least 1.
        max_new_tokens: the most to add to each.
        settings: how tokens are drawn; by default from the model's distribution.
        stop_tokens: tokens that end a continuation.
        num_samples: continuations of each prompt.
        generator: makes the sampling repeatable; on the device of `idx`.
        log_probs: give the log-probabilities of tokens too.
        draft: a smaller model that proposes tokens; see `gptfast.generation.speculative`.
        compiled: put a step through torch.compile, which takes a minute at the first of each shape.

    Returns:
        For each prompt its `num_samples` continuations.

    Raises:
        ValueError: a setting out of range, or token ids out of range.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    rows = torch.arange(len(idx), device=idx.device).repeat_interleave(num_samples)
    repeated = [length for length in lengths for _ in range(num_samples)]
    found = [Continuation() for _ in repeated]
    stops = frozenset(stop_tokens)
    _check_stops(model, stops)
    ends = lambda row, token: token in stops  # noqa: E731
    arguments = (idx[rows], repeated, max_new_tokens, settings, ends, generator, log_probs)
    for step in follow(model, draft, compiled, *arguments):
        for place, (row, token) in enumerate(zip(step.rows, step.tokens, strict=True)):
            found[row].tokens.append(token)
            if log_probs:
                found[row].log_probs.append(step.log_probs[place])
            found[row].finished = token in stops
    return [found[i : i + num_samples] for i in range(0, len(found), num_samples)]


def follow(
    model: CausalLM,
    draft: Draft | None,
    compiled: bool,
    idx: Tensor,
    lengths: Sequence[int],
    max_new_tokens: int,
    settings: Sampling | None,
    ends: Callable[[int, int], bool],
    generator: torch.Generator | None,
    log_probs: bool = True,
) -> Iterator[Step]:
    """`steps` with these arguments, with tokens that a draft proposes if there is one.

    Raises:
        ValueError: as `steps`, and for a draft and a compiled step together.
    """
    arguments = (idx, lengths, max_new_tokens, settings, ends, generator, log_probs)
    if draft is None:
        return steps(model, *arguments, compiled=compiled)
    if compiled:
        raise ValueError("a draft excludes a compiled step: what is read at a time is not one token")
    return speculative.steps(model, draft, *arguments)


@torch.no_grad()
def search_beams(
    model: CausalLM,
    idx: Tensor,
    lengths: Sequence[int],
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    early_stopping: beam_search.EarlyStopping = False,
    stop_tokens: Collection[int] = (),
    num_return_sequences: int = 1,
    settings: Sampling | None = None,
) -> list[list[beam_search.Hypothesis]]:
    """The likeliest continuations of prompts of any lengths.

    Args:
        model: the GPT.
        idx: as `continuations`.
        lengths: as `continuations`.
        max_new_tokens: as `continuations`.
        num_beams: open beginnings of each prompt; see `gptfast.generation.beam_search.search` for the method.
        length_penalty: above 0 is for long continuations, below for short ones.
        early_stopping: when the search of a prompt is over.
        stop_tokens: tokens that complete a continuation.
        num_return_sequences: hypotheses for each prompt.
        settings: penalties and the blocking of n-grams, which change log-probabilities. A search draws nothing: filters
            and temperatures other than 0 and 1 contradict it.

    Returns:
        For each prompt its best hypotheses, best first.

    Raises:
        ValueError: a setting out of range, or token ids out of range.
    """
    chosen = settings or Sampling()
    drawing = [name for name in ("top_k", "top_p", "min_p", "typical_p") if getattr(chosen, name) is not None]
    if chosen.temperature not in (0.0, 1.0):
        drawing.insert(0, "temperature")
    if drawing:
        raise ValueError(f"num_beams={num_beams} searches and draws nothing; it excludes {', '.join(drawing)}")
    check(model, idx, lengths, max_new_tokens)
    if len(idx) == 0:
        return []
    with evaluating(model):
        decoder = CachedDecoder(model, idx, lengths, max_new_tokens, Logits())

        def process(log_probs: Tensor, tokens: Tensor) -> Tensor:
            return sampling.process(log_probs, decoder.tokens, decoder.ends, decoder.prompts, chosen)

        return beam_search.search(
            decoder, len(idx), max_new_tokens, num_beams, length_penalty, early_stopping, stop_tokens,
            num_return_sequences, process,
        )  # fmt: skip


def _check_stops(model: CausalLM, stop_tokens: Collection[int]) -> None:
    vocabulary = model.config.vocab_size
    outside = sorted(token for token in stop_tokens if not 0 <= token < vocabulary)
    if outside:
        raise ValueError(f"stop_tokens must be from 0 to {vocabulary - 1}, got {', '.join(map(str, outside))}")
