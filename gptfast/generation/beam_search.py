"""Beam search: likely continuations of prompts, by keeping the likeliest prefixes of every length."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import compress
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gptfast.generation.sampling import require_integer

EarlyStopping = bool | Literal["never"]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]

NO_SCORE = float("-inf")  # of a missing beam or hypothesis


@dataclass(frozen=True)
class BeamSearch:
    """Settings of a beam search.

    Args:
        num_beams: open beams of each prompt. With 1 the search is greedy and ends with the first stop token.
        length_penalty: scores are divided by length ** length_penalty: above 0 favours long sequences, below short.
        early_stopping: when the search of a prompt is over, once it holds `num_beams` finished sequences. True: at
            once. False: when its best open beam, scored as if finished, is not better than the worst held sequence.
            "never": when no open beam can become better at any length up to the limit.
        num_return_sequences: hypotheses of each prompt, at most `num_beams`.

    Raises:
        ValueError: a setting is out of range.
    """

    num_beams: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        require_integer("num_beams", self.num_beams, 1)
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ValueError(
                f"num_return_sequences must be from 1 to num_beams={self.num_beams}, got {self.num_return_sequences}"
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if not (isinstance(self.early_stopping, bool) or self.early_stopping == "never"):
            raise ValueError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")


class Decoder(Protocol):
    """The interface of a model with a KV cache that the search calls; one row for each beam of each prompt."""

    def prefill(self) -> Tensor:
        """Read the prompts: logits [B, V] after each."""

    def decode_one_token(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, [B] int64: logits [B, V] after it."""

    def reorder(self, rows: Tensor) -> None:
        """Make row i the one that was rows[i]; rows [B'] int64 may repeat and omit rows."""


@dataclass(frozen=True)
class Hypothesis:
    """A continuation of a prompt.

    Args:
        tokens: the new tokens, with the stop token.
        score: sum of the tokens' log-probabilities, divided by their number to the power of the length penalty.
        finished: True if a stop token ends it, False if the limit of new tokens does.
    """

    tokens: list[int]
    score: float
    finished: bool


NO_HYPOTHESIS = Hypothesis([], NO_SCORE, False)


@dataclass
class _Held:
    """The best finished continuations of P prompts, best first, N places for each."""

    scores: Tensor  # [P, N] with the length penalty; -inf in free places
    tokens: Tensor  # [P, N, t] int64, padded behind the end
    lengths: Tensor  # [P, N] int64


@dataclass
class _State:
    """The search of P prompts after t tokens, with n open beams for each."""

    prompts: list[int]  # indices in the batch
    scores: Tensor  # [P, n] log-probabilities, best first; n is at most N
    tokens: Tensor  # [P, n, t] int64
    held: _Held

    def select(self, index: Tensor, prompts: list[int]) -> _State:
        """The search of some prompts; `index` [P'] int64 is their place among P."""
        held = _Held(self.held.scores[index], self.held.tokens[index], self.held.lengths[index])
        return _State(prompts, self.scores[index], self.tokens[index], held)


@dataclass
class _Candidates:
    """The C likeliest continuations of the open beams by one token, best first."""

    scores: Tensor  # [P, C] log-probabilities
    tokens: Tensor  # [P, C, t] int64
    beams: Tensor  # [P, C] int64, the open beam that each continues
    stopped: Tensor  # [P, C] bool, True if the last token is a stop token


@torch.no_grad()
def search(
    decoder: Decoder,
    prompt_batch: int,
    max_new_tokens: int,
    settings: BeamSearch,
    stop_tokens: Collection[int] = (),
    process: LogitsProcessor | None = None,
) -> list[list[Hypothesis]]:
    """Find likely continuations of each prompt (Sutskever et al. 2014, arXiv:1409.3215, section 3.2).

    Rules, sequences and scores are those of Hugging Face transformers 5.23 (`generate(num_beams=...)` without
    sampling) for the same logits, except

    - for equal scores, which `torch.topk` orders arbitrarily;
    - where fewer sequences than beams have a probability above 0: transformers fills up with sequences that score about
      -1e9 and count as finished for `early_stopping=True`; here they are left out;
    - where a length penalty far below 0 takes scores below -1e9, which transformers treats as missing;
    - with one beam and a `process`: transformers then decodes greedily and processes logits, not log-probabilities.

    A prompt whose search is over leaves the batch. This is exact: transformers from there on subtracts 1e9 from new
    scores of that prompt, which are then below all held ones.

    All tensors stay on the decoder's device. With stop tokens each step copies one flag per prompt to the host; without
    them nothing is copied before the end.

    Args:
        decoder: a decoder that is not prefilled yet.
        prompt_batch: B, the number of prompts.
        max_new_tokens: the longest continuation; 0 gives the empty one.
        settings: beams, length penalty and the rule that ends a search.
        stop_tokens: tokens that finish a sequence.
        process: maps log-probabilities [R, V] and the tokens after the prompt [R, t] int64 to log-probabilities [R, V],
            for penalties and n-gram blocking. Rows are the decoder's: B after `prefill`, then as `reorder` orders them.

    Returns:
        For each prompt its `num_return_sequences` best hypotheses, best first; missing ones are `NO_HYPOTHESIS`.

    Raises:
        ValueError: an argument out of range, or a decoder or `process` that returns another shape.
    """
    num_beams, length_penalty = settings.num_beams, settings.length_penalty
    require_integer("prompt_batch", prompt_batch, 1)
    require_integer("max_new_tokens", max_new_tokens, 0)
    # scores are float32, with exponents from -126 to 127
    if abs(length_penalty) * math.log2(max(max_new_tokens, 1)) > 126:
        raise ValueError(
            f"length_penalty must leave max_new_tokens ** length_penalty within float32, got {length_penalty} "
            f"for max_new_tokens={max_new_tokens}"
        )
    if max_new_tokens == 0:
        others = [NO_HYPOTHESIS] * (settings.num_return_sequences - 1)
        return [[Hypothesis([], 0.0, False), *others] for _ in range(prompt_batch)]
    logits = decoder.prefill()
    stops = set(stop_tokens)
    is_stop = _is_stop(stops, logits, prompt_batch)
    # enough for `num_beams` open beams whichever candidates stop
    count = (1 + len(stops)) * num_beams
    early_stopping = settings.early_stopping if num_beams > 1 else True
    state = _initial_state(prompt_batch, num_beams, logits.device)
    done: list[_State] = []
    for length in range(1, max_new_tokens + 1):
        log_probs = _log_probs(logits, state.tokens.flatten(0, 1), process)
        candidates = _candidates(state, log_probs, is_stop, count)
        state.held = _hold(state.held, candidates, length**length_penalty, length == max_new_tokens)
        if length == max_new_tokens:
            break
        rows = _advance(state, candidates, num_beams)  # [P, n]
        over = _is_over(state, length, max_new_tokens, length_penalty, early_stopping)
        flags = over.tolist() if stops else [False]  # the only synchronisation of the step
        if all(flags):
            break
        if any(flags):
            # sorted on the device: a copy of the indices from the host would synchronise
            remaining, finished = over.byte().argsort(stable=True).tensor_split([flags.count(False)])
            done.append(state.select(finished, list(compress(state.prompts, flags))))
            state = state.select(
                remaining, [prompt for prompt, flag in zip(state.prompts, flags, strict=True) if not flag]
            )
            rows = rows[remaining]
        if num_beams > 1 or any(flags):
            decoder.reorder(rows.flatten())
        logits = decoder.decode_one_token(state.tokens[:, :, -1].flatten())
    return _hypotheses([*done, state], prompt_batch, settings.num_return_sequences, stops)


def _is_stop(stops: set[int], logits: Tensor, prompt_batch: int) -> Tensor:
    """True for stop tokens, [V] bool on the device of `logits`.

    Raises:
        ValueError: `logits` are not [prompt_batch, V], or the stop tokens do not fit V.
    """
    if logits.dim() != 2 or len(logits) != prompt_batch:
        raise ValueError(f"the decoder's logits must be [{prompt_batch}, V], got shape {tuple(logits.shape)}")
    vocab_size = logits.shape[1]
    require_stop_tokens(stops, vocab_size)
    if vocab_size <= len(stops):
        raise ValueError(
            f"a search with {len(stops)} stop tokens needs a vocabulary of at least {len(stops) + 1}, got {vocab_size}"
        )
    is_stop = torch.zeros(vocab_size, dtype=torch.bool)
    is_stop[list(stops)] = True
    return is_stop.to(logits.device)


def require_stop_tokens(stop_tokens: Collection[int], vocab_size: int) -> None:
    """Raise ValueError for stop tokens out of range."""
    outside = sorted(token for token in stop_tokens if not 0 <= token < vocab_size)
    if outside:
        raise ValueError(f"stop_tokens must be from 0 to {vocab_size - 1}, got {', '.join(map(str, outside))}")


def _initial_state(prompt_batch: int, num_beams: int, device: torch.device) -> _State:
    """One open beam without tokens for each prompt."""

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    scores = torch.full((prompt_batch, num_beams), NO_SCORE, device=device)
    held = _Held(scores, tokens=integers(prompt_batch, num_beams, 0), lengths=integers(prompt_batch, num_beams))
    open_scores = torch.zeros(prompt_batch, 1, device=device)
    return _State(list(range(prompt_batch)), open_scores, integers(prompt_batch, 1, 0), held)


def _log_probs(logits: Tensor, tokens: Tensor, process: LogitsProcessor | None) -> Tensor:
    """Processed log-probabilities [R, V] float32 after rows of `tokens` [R, t]."""
    log_probs = logits.float().log_softmax(dim=-1)
    if process is None:
        return log_probs
    processed = process(log_probs, tokens)
    if processed.shape != log_probs.shape:
        raise ValueError(f"process must keep the shape {tuple(log_probs.shape)}, got {tuple(processed.shape)}")
    return processed


def _candidates(state: _State, log_probs: Tensor, is_stop: Tensor, count: int) -> _Candidates:
    """The `count` likeliest continuations by one token, or all if there are fewer; log_probs is [P * n, V]."""
    prompts, beams = state.scores.shape
    vocab_size = log_probs.shape[1]
    scores = (state.scores[:, :, None] + log_probs.view(prompts, beams, vocab_size)).flatten(1)  # [P, n * V]
    best = scores.topk(min(count, scores.shape[1]))
    beam = best.indices // vocab_size
    token = best.indices % vocab_size
    return _Candidates(
        scores=best.values,
        tokens=torch.cat((_select(state.tokens, beam), token[:, :, None]), dim=2),
        beams=beam,
        stopped=is_stop[token],
    )


def _hold(held: _Held, candidates: _Candidates, divisor: float, is_last: bool) -> _Held:
    """The best of the held sequences and the finished candidates, whose scores are divided by `divisor`.

    Only the N likeliest candidates can be held; the last token finishes all N. The others keep enough beams open.
    """
    places = held.scores.shape[1]
    scores = candidates.scores[:, :places] / divisor
    if not is_last:
        scores = scores.masked_fill(~candidates.stopped[:, :places], NO_SCORE)
    tokens = candidates.tokens[:, :places]
    lengths = torch.full_like(tokens[:, :, 0], tokens.shape[2])
    best = torch.cat((held.scores, scores), dim=1).topk(places)
    return _Held(
        scores=best.values,
        tokens=_select(torch.cat((F.pad(held.tokens, (0, 1)), tokens), dim=1), best.indices),
        lengths=torch.cat((held.lengths, lengths), dim=1).gather(1, best.indices),
    )


def _advance(state: _State, candidates: _Candidates, num_beams: int) -> Tensor:
    """Make the likeliest unfinished candidates the open beams; return the decoder's row that each continues, [P, n]."""
    beams_before = state.scores.shape[1]
    open_scores = candidates.scores.masked_fill(candidates.stopped, NO_SCORE)
    best = open_scores.topk(min(num_beams, open_scores.shape[1]))
    state.scores = best.values
    state.tokens = _select(candidates.tokens, best.indices)
    first_rows = torch.arange(len(state.prompts), device=best.indices.device)[:, None] * beams_before
    return first_rows + candidates.beams.gather(1, best.indices)


def _is_over(
    state: _State, length: int, max_new_tokens: int, length_penalty: float, early_stopping: EarlyStopping
) -> Tensor:
    """True for prompts whose search is over after `length` tokens, [P] bool."""
    # log-probabilities only fall: a beam scores best finished now, or at the limit where length is rewarded
    best_length = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
    best_open = state.scores[:, 0] / best_length**length_penalty
    worst_held = state.held.scores[:, -1]  # -inf while a place is free
    over = ~(best_open > worst_held)
    return over | (worst_held > NO_SCORE) if early_stopping is True else over


def _select(tokens: Tensor, index: Tensor) -> Tensor:
    """Select the sequences `index` [P, m] of each prompt from `tokens` [P, n, t]: [P, m, t]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def _hypotheses(
    done: list[_State], prompt_batch: int, num_return_sequences: int, stops: set[int]
) -> list[list[Hypothesis]]:
    """The best hypotheses of all prompts, in the order of the batch."""
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(prompt_batch)]
    for state in done:
        held = (state.held.scores, state.held.tokens, state.held.lengths)
        columns = (whole[:, :num_return_sequences].tolist() for whole in held)
        for prompt, *of_prompt in zip(state.prompts, *columns, strict=True):
            for score, padded, length in zip(*of_prompt, strict=True):
                tokens = padded[:length]
                found = Hypothesis(tokens, score, tokens[-1] in stops) if score > NO_SCORE else NO_HYPOTHESIS
                hypotheses[prompt].append(found)
    return hypotheses
