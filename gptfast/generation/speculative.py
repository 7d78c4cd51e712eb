"""Speculative decoding: a small model proposes tokens, and the large one reads them all at once.

Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). What comes out is drawn from the large
model's own distribution, whatever the small one proposes: a poor draft costs time alone. Reading a few tokens takes a
large model hardly longer than reading one, for either way all its weights come from memory once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from gptfast.generation import autoregressive as plain
from gptfast.generation import sampling
from gptfast.generation.autoregressive import Step, check, evaluating
from gptfast.generation.decoder import CausalLM, device_of
from gptfast.generation.rounds import Rounds, Told
from gptfast.generation.sampling import Sampling


@dataclass
class Draft:
    """A smaller GPT of the same tokenizer that proposes tokens for a larger one, and how well it does.

    Its window, depth, width, dtype and backend may be others than the larger one's. Nothing is proposed beyond its
    window: one as long as the larger model's serves best.

    Raises:
        ValueError: `tokens` is no integer, or below 1.
    """

    model: CausalLM
    """On the device of the larger one."""
    tokens: int = 4
    """How many it proposes at a time."""
    proposed: int = 0
    """Tokens it has proposed, in all uses."""
    accepted: int = 0
    """Those of them that the larger model took, some of them perhaps after the end of a sequence."""

    def __post_init__(self) -> None:
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, Integral):
            raise ValueError(f"tokens must be an integer, got {self.tokens!r}")
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")

    @property
    def acceptance_rate(self) -> float:
        """The share of its proposals that were accepted; nan before there were any."""
        return self.accepted / self.proposed if self.proposed else math.nan


@torch.no_grad()
def steps(
    model: CausalLM,
    draft: Draft,
    idx: Tensor,
    lengths: Sequence[int],
    max_new_tokens: int,
    settings: Sampling | None = None,
    ends: Callable[[int, int], bool] = lambda row, token: False,
    generator: torch.Generator | None = None,
    log_probs: bool = True,
) -> Iterator[Step]:
    """The tokens of `gptfast.generation.autoregressive.steps`, from the same distribution, in uneven rounds.

    With temperature 0 they are the same tokens, but for logits so close to the largest that rounding decides: a model
    that reads several tokens adds up in another order than one that reads them singly.

    Nothing is proposed to a sequence that is so long that not all proposals fit into the windows of both models: the
    larger goes on alone with it, after all others have ended.

    Args:
        model: the larger GPT, whose distribution counts.
        draft: the smaller; its counters go on.
        idx: [B, T] int64 prompts, padded at their ends.
        lengths: how many tokens of each are the prompt's, at least 1.
        max_new_tokens: the most to add to each.
        settings: how tokens are drawn, for the draft as for the model.
        ends: whether a token ends the sequence at a place of the batch; called for each, after the step was given out.
        generator: makes the sampling repeatable; on the device of `idx`.
        log_probs: give the larger model's log-probabilities of the tokens too.

    Raises:
        ValueError: prompts that cannot be, a draft of another vocabulary or on another device, or logits of either
            model that no token can be drawn of.
    """
    check(model, idx, lengths, max_new_tokens)
    _require_pair(model, draft.model)
    if max_new_tokens == 0:
        return
    draw = _Draw(settings or Sampling(), generator, log_probs)
    sequences = [
        _Sequence(row, idx[row, :length], length, length, length + max_new_tokens) for row, length in enumerate(lengths)
    ]
    with evaluating(model), evaluating(draft.model):
        longest = min(model.config.block_size, draft.model.config.block_size) - draft.tokens
        left = [sequence for sequence in sequences if sequence.length > longest]
        short = [sequence for sequence in sequences if sequence.length <= longest]
        if short:
            yield from _proposed(model, draft, short, longest, left, draw, ends)
        if left:
            yield from _alone(model, left, draw, ends)


class _Draw(NamedTuple):
    settings: Sampling
    generator: torch.Generator | None
    log_probs: bool


@dataclass
class _Sequence:
    """A prompt and what the host knows of its continuation."""

    row: int  # in the batch
    tokens: Tensor  # [T] int64 on the device, `length` of them or more, where it begins or goes on alone
    prompt: int
    length: int
    last: int  # the length with which it has all the tokens that are wanted

    def add(self, token: int, ends: Callable[[int, int], bool]) -> bool:
        """Count a token that was given out; whether more are wanted."""
        self.length += 1
        return not ends(self.row, token) and self.length < self.last


def _proposed(
    model: CausalLM,
    draft: Draft,
    sequences: list[_Sequence],
    longest: int,
    left: list[_Sequence],
    draw: _Draw,
    ends: Callable[[int, int], bool],
) -> Iterator[Step]:
    """The tokens of sequences up to their ends, or until they have more than `longest`; these are added to `left`."""
    idx, lengths = _padded(sequences)
    rounds = Rounds(model, draft.model, idx, lengths, draft.tokens, sequences[0].last - sequences[0].length, *draw)
    places = list(range(len(sequences)))  # of sequences in the rounds
    while sequences:
        told = rounds.next(max(sequence.last - sequence.length for sequence in sequences))
        going = dict(zip(places, sequences, strict=True))
        _count(draft, told, going)
        for number in range(len(told.tokens[0])):
            there = [place for place in going if told.accepted[place] >= number]
            if not there:
                break
            sampling.require_finite([told.largest[place][number] for place in there])
            tokens = [told.tokens[place][number] for place in there]
            found = [told.log_probs[place][number] for place in there] if draw.log_probs else []
            yield Step([going[place].row for place in there], tokens, found)
            for place, token in zip(there, tokens, strict=True):
                if not going[place].add(token, ends):
                    del going[place]
        for place in [place for place, sequence in going.items() if sequence.length > longest]:
            left.append(replace(going.pop(place), tokens=rounds.tokens[place].clone()))
        sequences = list(going.values())
        if sequences:
            places = rounds.keep(list(going))


def _count(draft: Draft, told: Told, going: dict[int, _Sequence]) -> None:
    """Add to the draft's counters what was proposed to sequences, by their places, and what of it is of use."""
    try:
        for largest in zip(*(told.draft_largest[place] for place in going), strict=True):
            sampling.require_finite(largest)
    except ValueError as error:
        raise ValueError(f"draft.model: {error}") from None
    for place, sequence in going.items():
        count = min(len(told.draft_largest[place]), sequence.last - sequence.length - 1)
        draft.proposed += count
        draft.accepted += min(told.accepted[place], count)


def _alone(
    model: CausalLM, sequences: list[_Sequence], draw: _Draw, ends: Callable[[int, int], bool]
) -> Iterator[Step]:
    """The tokens that sequences lack, without a draft."""
    idx, lengths = _padded(sequences)
    prompts = [sequence.prompt for sequence in sequences]
    most = max(sequence.last - sequence.length for sequence in sequences)
    over = lambda place, token: not sequences[place].add(token, ends)  # noqa: E731
    for step in plain.steps(model, idx, lengths, most, draw.settings, over, *draw[1:], prompts=prompts):
        yield Step([sequences[place].row for place in step.rows], *step[1:])


def _padded(sequences: list[_Sequence]) -> tuple[Tensor, list[int]]:
    """The tokens of sequences, [B, T], and how many they are."""
    tokens = [sequence.tokens[: sequence.length] for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), [sequence.length for sequence in sequences]


def _require_pair(model: CausalLM, draft: CausalLM) -> None:
    vocabulary, wanted = draft.config.vocab_size, model.config.vocab_size
    if vocabulary != wanted:
        raise ValueError(
            f"draft.model has a vocabulary of {vocabulary} tokens, the model one of {wanted}; speculative decoding "
            "needs two models of one tokenizer"
        )
    device, there = device_of(draft), device_of(model)
    if device != there:
        raise ValueError(f"draft.model is on {device}, the model on {there}; move one to the other")
