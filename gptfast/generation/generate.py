"""Continuations of token ids: greedy, sampled, speculative or by beam search."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gptfast.generation import beam_search
from gptfast.generation.autoregressive import Step, decode_n_tokens
from gptfast.generation.beam_search import BeamSearch, EarlyStopping, Hypothesis
from gptfast.generation.decoder import CachedDecoder, CausalLM, GenerationRequest, RawLogits, evaluating
from gptfast.generation.sampling import Sampling, process_logits, require_integer
from gptfast.generation.speculative import Draft, speculative_decode


@dataclass
class Continuation:
    """A continuation of a prompt.

    Args:
        tokens: the new tokens, with the stop token.
        log_probs: the model's log-probability of each token, before temperature, penalties and filters.
        finished: True if a stop token ends it.
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
    early_stopping: EarlyStopping = False,
    draft: Draft | None = None,
    compiled: bool = False,
    **settings: Any,
) -> Tensor:
    """Continue each row of `idx`; nanoGPT's function, with more options.

    A KV cache lets each token be computed once, until the window of `block_size` tokens is full. From then on every
    token reads the window again. Dropout is off, and the model's mode is restored afterwards.

    Args:
        model: the GPT.
        idx: [B, T] int64 token ids, T >= 1.
        max_new_tokens: tokens to add to each row.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        generator: source of random numbers, on the device of `idx`; a seeded one makes the result repeatable.
        stop_tokens: tokens that end a row; the last of them fills it up.
        num_samples: continuations of each row, in rows below each other; with beams the best ones, best first.
        num_beams: above 1 searches for likely continuations and draws nothing.
        length_penalty: of the beam search; see `BeamSearch`.
        early_stopping: of the beam search; see `BeamSearch`.
        draft: a smaller model that proposes tokens; see `gptfast.generation.speculative`.
        compiled: compile each step with `torch.compile`, which takes a minute for each new shape.
        settings: the other fields of `gptfast.Sampling`.

    Returns:
        [B * num_samples, T + n] int64, n the number of new tokens of the longest continuation.

    Raises:
        ValueError: a setting out of range, settings that exclude each other, or token ids out of range.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, **settings)
    lengths = [idx.shape[-1]] * len(idx)
    request = GenerationRequest(
        idx, lengths, max_new_tokens, sampling, generator=generator, log_probs=False, compiled=compiled
    )
    found: list[list[Continuation]] | list[list[Hypothesis]]
    if num_beams == 1:
        found = continuations(model, request, stop_tokens, num_samples, draft)
    elif draft is not None or compiled:
        raise ValueError(f"num_beams={num_beams} excludes a draft and a compiled step: both are for drawing tokens")
    else:
        beams = BeamSearch(num_beams, length_penalty, early_stopping, num_samples)
        found = search_beams(model, request, beams, stop_tokens)
    rows = [continuation.tokens for samples in found for continuation in samples]
    longest = max(map(len, rows), default=0)
    new = [row + row[-1:] * (longest - len(row)) for row in rows]
    added = torch.tensor(new, dtype=idx.dtype, device=idx.device).view(len(rows), longest)
    return torch.cat((idx.repeat_interleave(num_samples, dim=0), added), dim=1)


def continuations(
    model: CausalLM,
    request: GenerationRequest,
    stop_tokens: Collection[int] = (),
    num_samples: int = 1,
    draft: Draft | None = None,
) -> list[list[Continuation]]:
    """Continue prompts up to a stop token, which replaces the request's `is_finished`.

    Returns:
        For each prompt its `num_samples` continuations.

    Raises:
        ValueError: an argument out of range, or options that exclude each other.
    """
    require_integer("num_samples", num_samples, 1)
    beam_search.require_stop_tokens(stop_tokens, model.config.vocab_size)
    stops = frozenset(stop_tokens)
    repeated = replace(
        request,
        idx=request.idx.repeat_interleave(num_samples, dim=0),
        lengths=[length for length in request.lengths for _ in range(num_samples)],
        is_finished=lambda row, token: token in stops,
    )
    found = [Continuation() for _ in repeated.lengths]
    for step in decode(model, repeated, draft):
        for row, token in zip(step.rows, step.tokens, strict=True):
            found[row].tokens.append(token)
            found[row].finished = token in stops
        for row, log_prob in zip(step.rows, step.log_probs, strict=False):  # empty unless requested
            found[row].log_probs.append(log_prob)
    return [found[i : i + num_samples] for i in range(0, len(found), num_samples)]


def decode(model: CausalLM, request: GenerationRequest, draft: Draft | None = None) -> Iterator[Step]:
    """Yield new tokens step by step, with a draft's proposals if there is one.

    Raises:
        ValueError: as `decode_n_tokens` and `speculative_decode`, and for a draft with a compiled step.
    """
    if draft is None:
        return decode_n_tokens(model, request)
    if request.compiled:
        raise ValueError("a draft excludes a compiled step, which reads one token at a time")
    return speculative_decode(model, draft, request)


@torch.no_grad()
def search_beams(
    model: CausalLM, request: GenerationRequest, beams: BeamSearch, stop_tokens: Collection[int] = ()
) -> list[list[Hypothesis]]:
    """Find the likeliest continuations of prompts; see `gptfast.generation.beam_search.search`.

    The request's penalties and n-gram blocking apply to log-probabilities.

    Raises:
        ValueError: a setting or token ids out of range, filters, or temperatures other than 0 and 1: a search draws
            nothing.
    """
    sampling = request.sampling
    excluded = [name for name in ("top_k", "top_p", "min_p", "typical_p") if getattr(sampling, name) is not None]
    if sampling.temperature not in (0.0, 1.0):
        excluded.insert(0, "temperature")
    if excluded:
        raise ValueError(f"num_beams={beams.num_beams} searches and draws nothing; it excludes {', '.join(excluded)}")
    model.require_tokens(request.idx)
    if len(request.idx) == 0:
        return []
    with evaluating(model):
        decoder = CachedDecoder(model, request, RawLogits())

        def process(log_probs: Tensor, tokens: Tensor) -> Tensor:
            return process_logits(log_probs, decoder.tokens, decoder.lengths, decoder.prompt_lengths, sampling)

        return beam_search.search(decoder, len(request.idx), request.max_new_tokens, beams, stop_tokens, process)
