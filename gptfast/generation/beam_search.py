"""Beam search: the likeliest continuations of prompts, found among the likeliest beginnings of every length."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

EarlyStopping = bool | Literal["never"]
Process = Callable[[Tensor, Tensor], Tensor]

NOWHERE = float("-inf")  # the score of a beam or a hypothesis that is not there


class Decoder(Protocol):
    """What the search asks of a model that remembers the rows it has read; one row for each beam of each prompt."""

    def prefill(self) -> Tensor:
        """Read the prompts, one to a row: logits [B, V] of the token after each."""

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of each row, [B] int64: logits [B, V] of the token after it."""

    def select(self, rows: Tensor) -> None:
        """From now on row i continues what row `rows[i]` was; rows [B'] int64 repeats rows and leaves rows out."""


@dataclass(frozen=True)
class Hypothesis:
    """A continuation of a prompt.

    Args:
        tokens: without the prompt, with the stop token.
        score: sum of the tokens' log-probabilities, divided by their number to the power of the length penalty.
        finished: a stop token ends it, not the limit of new tokens.
    """

    tokens: list[int]
    score: float
    finished: bool


@dataclass
class _Held:
    """The best complete continuations of P prompts so far, best first, N places for each.

    Args:
        scores: [P, N] with the length penalty; places that are not taken have -inf.
        tokens: [P, N, t] int64, padded behind the end.
        lengths: [P, N] int64.
    """

    scores: Tensor
    tokens: Tensor
    lengths: Tensor

    def of(self, prompts: Tensor) -> _Held:
        return _Held(self.scores[prompts], self.tokens[prompts], self.lengths[prompts])


@dataclass
class _State:
    """The search of P prompts after t tokens.

    Args:
        prompts: the number of each prompt in the batch, on the host.
        scores: [P, n] log-probabilities of the open beams, best first; n is N as soon as there are as many.
        tokens: [P, n, t] int64 of the open beams.
        held: what is complete.
    """

    prompts: list[int]
    scores: Tensor
    tokens: Tensor
    held: _Held


@dataclass
class _Candidates:
    """The C likeliest beginnings that are one token longer than the open beams, best first.

    Args:
        scores: [P, C] log-probabilities.
        tokens: [P, C, t] int64.
        beams: [P, C] int64, the open beam that each continues.
        stopped: [P, C] bool, whether its last token is a stop token.
    """

    scores: Tensor
    tokens: Tensor
    beams: Tensor
    stopped: Tensor


@torch.no_grad()
def search(
    decoder: Decoder,
    prompt_batch: int,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    stop_tokens: Collection[int] = (),
    num_return_sequences: int = 1,
    process: Process | None = None,
) -> list[list[Hypothesis]]:
    """Find likely continuations of each prompt (Sutskever et al. 2014, arXiv:1409.3215, section 3.2).

    Rules and arithmetic are those of Hugging Face transformers 5.23 (`generate(num_beams=...)` without sampling), and
    so are sequences and scores, from the same logits. They can differ
    - where scores are exactly equal: `torch.topk` does not say which of equals comes first;
    - where fewer sequences than beams have a probability above 0 (a vocabulary smaller than `num_beams`, or `process`
      forbids nearly all): transformers fills up with sequences that score about -1e9, and those count as complete for
      `early_stopping=True`; here they are left out;
    - where a length penalty far below 0 takes scores below -1e9, which transformers takes for no sequence;
    - with one beam and a `process`: transformers is then greedy and hands its processors logits, not log-probabilities.

    The search of a prompt is over when nothing can come into its held hypotheses any more, by the rule of
    `early_stopping`. Its rows are then dropped from the decoder, which is exact: from there on transformers takes 1e9
    from the score of whatever the prompt still finds, which is less than any of those held. What remains is the model's
    own rounding, if that depends on the number of rows.

    All tensors stay on the decoder's device. With stop tokens one flag for each prompt is read on the host per step,
    all in one copy: whether its search is over. Without, nothing is read before the end.

    Args:
        decoder: the model, at the prompts.
        prompt_batch: B, the number of prompts.
        max_new_tokens: the longest continuation; 0 gives the empty one.
        num_beams: open beginnings of each prompt. With 1 the search is greedy, and over with the first stop token.
        length_penalty: scores are divided by length ** length_penalty: above 0 is for long sequences, below for short.
        early_stopping: when the search of a prompt is over, once it holds `num_beams` complete sequences. True: at
            once. False: when its best open beam, scored as if it were complete, is not better than the worst held.
            "never": when no open beam can become better, complete at any length up to `max_new_tokens`.
        stop_tokens: tokens that complete a sequence.
        num_return_sequences: hypotheses for each prompt.
        process: changes log-probabilities before they are added up, as penalties and the blocking of n-grams do:
            `process(log_probs [R, V], tokens [R, t] int64) -> [R, V]`, where tokens are those after the prompt. The
            rows are those of the decoder at that moment (B after `prefill`, then as `select` was told), so whoever
            needs the prompts too takes them along in `select`.

    Returns:
        For each prompt its `num_return_sequences` best hypotheses, best first. `Hypothesis([], -inf, False)` stands
        where there is none.

    Raises:
        ValueError: a setting out of range, or a decoder or a `process` whose result has another shape.
    """
    _check(prompt_batch, max_new_tokens, num_beams, length_penalty, early_stopping, num_return_sequences)
    if max_new_tokens == 0:
        others = num_return_sequences - 1
        return [[Hypothesis([], 0.0, False), *(_nothing() for _ in range(others))] for _ in range(prompt_batch)]
    logits = decoder.prefill()
    stops = set(stop_tokens)
    is_stop = _is_stop(stops, logits, prompt_batch)
    # as many of each beam, so that `num_beams` go on whatever stops
    count = (1 + len(stops)) * num_beams
    if num_beams == 1:
        early_stopping = True
    state = _start(prompt_batch, num_beams, logits.device)
    done: list[tuple[list[int], _Held]] = []
    for length in range(1, max_new_tokens + 1):
        log_probs = _log_probs(logits, state.tokens.flatten(0, 1), process)
        candidates = _candidates(state, log_probs, is_stop, count)
        state.held = _hold(state.held, candidates, length**length_penalty, length == max_new_tokens)
        if length == max_new_tokens:
            break
        rows = _go_on(state, candidates, num_beams)  # [P, n]
        some_over = False
        if stops:
            over = _over(state, length, max_new_tokens, length_penalty, early_stopping)
            ends = over.tolist()  # the one read of this step
            if all(ends):
                break
            some_over = any(ends)
            if some_over:
                taken, going = _take_out(state, over, ends)
                done.append(taken)
                rows = rows[going]
        if num_beams > 1 or some_over:
            decoder.select(rows.flatten())
        logits = decoder.step(state.tokens[:, :, -1].flatten())
    done.append((state.prompts, state.held))
    return _read(done, prompt_batch, num_return_sequences, stops)


def _check(
    prompt_batch: int,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
    num_return_sequences: int,
) -> None:
    """Raise ValueError for a setting out of range. Arguments as `search`."""
    for name, value, least in (
        ("prompt_batch", prompt_batch, 1),
        ("max_new_tokens", max_new_tokens, 0),
        ("num_beams", num_beams, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 1 <= num_return_sequences <= num_beams:
        raise ValueError(f"num_return_sequences must be from 1 to num_beams={num_beams}, got {num_return_sequences}")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    # scores are float32, whose exponents end at -126 and 127
    if abs(length_penalty) * math.log2(max(max_new_tokens, 1)) > 126:
        raise ValueError(
            f"length_penalty must leave max_new_tokens ** length_penalty within float32, got {length_penalty} "
            f"for max_new_tokens={max_new_tokens}"
        )
    if not (isinstance(early_stopping, bool) or early_stopping == "never"):
        raise ValueError(f"early_stopping must be True, False or 'never', got {early_stopping!r}")


def _is_stop(stops: set[int], logits: Tensor, prompt_batch: int) -> Tensor:
    """Whether each token is a stop token, [V] bool on the device of `logits`.

    Raises:
        ValueError: `logits` are not [prompt_batch, V], or V tokens do not go with these stop tokens.
    """
    if logits.dim() != 2 or len(logits) != prompt_batch:
        raise ValueError(f"the decoder's logits must be [{prompt_batch}, V], got shape {tuple(logits.shape)}")
    vocabulary = logits.shape[1]
    outside = sorted(token for token in stops if not 0 <= token < vocabulary)
    if outside:
        raise ValueError(f"stop_tokens must be from 0 to {vocabulary - 1}, got {', '.join(map(str, outside))}")
    if vocabulary <= len(stops):
        raise ValueError(
            f"a search with {len(stops)} stop tokens needs a vocabulary of at least {len(stops) + 1}, got {vocabulary}"
        )
    is_stop = torch.zeros(vocabulary, dtype=torch.bool)
    is_stop[list(stops)] = True
    return is_stop.to(logits.device)


def _start(prompt_batch: int, num_beams: int, device: torch.device) -> _State:
    """One open beam without tokens for each prompt, and nothing held."""
    held = _Held(
        scores=torch.full((prompt_batch, num_beams), NOWHERE, device=device),
        tokens=torch.zeros(prompt_batch, num_beams, 0, dtype=torch.int64, device=device),
        lengths=torch.zeros(prompt_batch, num_beams, dtype=torch.int64, device=device),
    )
    return _State(
        prompts=list(range(prompt_batch)),
        scores=torch.zeros(prompt_batch, 1, device=device),
        tokens=torch.zeros(prompt_batch, 1, 0, dtype=torch.int64, device=device),
        held=held,
    )


def _log_probs(logits: Tensor, tokens: Tensor, process: Process | None) -> Tensor:
    """Log-probabilities [R, V] float32 after rows of `tokens` [R, t], as `process` leaves them."""
    log_probs = logits.float().log_softmax(dim=-1)
    if process is None:
        return log_probs
    shape = log_probs.shape
    log_probs = process(log_probs, tokens)
    if log_probs.shape != shape:
        raise ValueError(f"process must keep the shape {tuple(shape)}, got {tuple(log_probs.shape)}")
    return log_probs


def _candidates(state: _State, log_probs: Tensor, is_stop: Tensor, count: int) -> _Candidates:
    """The `count` likeliest continuations by one token, or as many as there are.

    Args:
        state: of P prompts with n open beams each.
        log_probs: [P * n, V].
        is_stop: [V] bool.
        count: C.
    """
    prompts, beams = state.scores.shape
    vocabulary = log_probs.shape[1]
    scores = (state.scores[:, :, None] + log_probs.view(prompts, beams, vocabulary)).flatten(1)  # [P, n * V]
    best = scores.topk(min(count, scores.shape[1]))
    beam = best.indices // vocabulary
    token = best.indices % vocabulary
    return _Candidates(
        scores=best.values,
        tokens=torch.cat((_rows(state.tokens, beam), token[:, :, None]), dim=2),
        beams=beam,
        stopped=is_stop[token],
    )


def _hold(held: _Held, candidates: _Candidates, divisor: float, last: bool) -> _Held:
    """The best of what was held and what is complete now, by scores that are divided by `divisor`.

    Only the N likeliest candidates may come in; those behind them are there for the beams to go on. After the `last`
    token all of those N are complete.
    """
    places = held.scores.shape[1]
    scores = candidates.scores[:, :places] / divisor
    if not last:
        scores = scores.masked_fill(~candidates.stopped[:, :places], NOWHERE)
    tokens = candidates.tokens[:, :places]
    lengths = torch.full_like(tokens[:, :, 0], tokens.shape[2])
    best = torch.cat((held.scores, scores), dim=1).topk(places)
    return _Held(
        scores=best.values,
        tokens=_rows(torch.cat((F.pad(held.tokens, (0, 1)), tokens), dim=1), best.indices),
        lengths=torch.cat((held.lengths, lengths), dim=1).gather(1, best.indices),
    )


def _go_on(state: _State, candidates: _Candidates, num_beams: int) -> Tensor:
    """Make the likeliest candidates that do not stop the open beams of `state`.

    Returns:
        [P, n] int64: the decoder's row that each continues.
    """
    rows_before = state.scores.shape[1]
    open_scores = candidates.scores.masked_fill(candidates.stopped, NOWHERE)
    best = open_scores.topk(min(num_beams, open_scores.shape[1]))
    state.scores = best.values
    state.tokens = _rows(candidates.tokens, best.indices)
    first = torch.arange(len(state.prompts), device=best.indices.device)[:, None] * rows_before
    return first + candidates.beams.gather(1, best.indices)


def _over(
    state: _State, length: int, max_new_tokens: int, length_penalty: float, early_stopping: EarlyStopping
) -> Tensor:
    """Whether the search of each prompt is over after `length` tokens, [P] bool. Arguments as `search`."""
    # a log-probability only falls, so a beam scores best complete now, or as long as can be where length is rewarded
    best_length = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
    best_open = state.scores[:, 0] / best_length**length_penalty
    worst_held = state.held.scores[:, -1]  # -inf as long as a place is free
    over = ~(best_open > worst_held)
    return over | (worst_held > NOWHERE) if early_stopping is True else over


def _take_out(state: _State, over: Tensor, ends: list[bool]) -> tuple[tuple[list[int], _Held], Tensor]:
    """Leave only the prompts in the state whose search goes on.

    Args:
        state: of P prompts.
        over: [P] bool.
        ends: the same on the host.

    Returns:
        The prompts that are over, with what they hold, and the places [P'] int64 of those that go on.
    """
    # the places are known on the host too, but need not be copied from there
    places = over.byte().argsort(stable=True)
    count = ends.count(False)
    going = places[:count]
    taken = [prompt for prompt, end in zip(state.prompts, ends, strict=True) if end], state.held.of(places[count:])
    state.prompts = [prompt for prompt, end in zip(state.prompts, ends, strict=True) if not end]
    state.scores = state.scores[going]
    state.tokens = state.tokens[going]
    state.held = state.held.of(going)
    return taken, going


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Of `tokens` [P, n, t] the sequences `index` [P, m] of each prompt, [P, m, t]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def _read(
    done: list[tuple[list[int], _Held]], prompt_batch: int, num_return_sequences: int, stops: set[int]
) -> list[list[Hypothesis]]:
    """The best hypotheses of all prompts, in the order of the batch, from what was held when their search was over."""
    hypotheses: list[list[Hypothesis]] = [[] for _ in range(prompt_batch)]
    for prompts, held in done:
        columns = (part[:, :num_return_sequences].tolist() for part in (held.scores, held.tokens, held.lengths))
        for prompt, *of_prompt in zip(prompts, *columns, strict=True):
            for score, padded, length in zip(*of_prompt, strict=True):
                tokens = padded[:length]
                there = score > NOWHERE
                hypotheses[prompt].append(Hypothesis(tokens, score, tokens[-1] in stops) if there else _nothing())
    return hypotheses


def _nothing() -> Hypothesis:
    return Hypothesis([], NOWHERE, False)
