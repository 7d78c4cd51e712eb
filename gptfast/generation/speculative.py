"""Speculative decoding: a small model proposes tokens, and the large one reads them all at once.

Leviathan et al. 2023 (arXiv:2211.17192) and Chen et al. 2023 (arXiv:2302.01318). What comes out is drawn from the large
model's own distribution, whatever the small one proposes: a poor draft costs time alone. Reading a few tokens takes a
large model hardly longer than reading one, for either way all its weights come from memory once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast.generation import decoding, sampling
from gptfast.generation.cache import KVCache
from gptfast.generation.inference import for_decoding
from gptfast.generation.sampling import Sampling
from gptfast.generation.steps import Step, check, evaluating, log_softmax_of

if TYPE_CHECKING:
    from gptfast.model import GPT


@dataclass
class Draft:
    """A smaller GPT of the same tokenizer that proposes tokens for a larger one, and how well it does.

    Its window, depth, width, dtype and backend may be others than the larger one's. Nothing is proposed beyond its
    window: one as long as the larger model's serves best.

    Raises:
        ValueError: `tokens` is no integer, or below 1.
    """

    model: GPT
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
    model: GPT,
    draft: Draft,
    idx: Tensor,
    lengths: Sequence[int],
    max_new_tokens: int,
    settings: Sampling | None = None,
    ends: Callable[[int, int], bool] = lambda row, token: False,
    generator: torch.Generator | None = None,
    log_probs: bool = True,
) -> Iterator[Step]:
    """The tokens of `gptfast.generation.steps.steps`, from the same distribution, one sequence after another.

    With temperature 0 they are the same tokens, but for logits so close to the largest that rounding decides: a model
    that reads several tokens adds up in another order than one that reads them singly.

    Once a sequence fills the window of either model nothing more is proposed, and the larger goes on alone.

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
    if max_new_tokens == 0 or len(idx) == 0:
        return
    longest = max(lengths) + max_new_tokens
    with evaluating(model), evaluating(draft.model):
        target, proposer = (_Reader(each, longest, len(idx) * max_new_tokens) for each in (model, draft.model))
        for row, length in enumerate(lengths):
            sequence = _Sequence(idx[row : row + 1, :length], max_new_tokens, settings or Sampling(), generator)
            for token, log_prob in _continued(sequence, target, proposer, draft, max_new_tokens, log_probs):
                yield Step([row], [token], [log_prob] if log_probs else [])
                if ends(row, token):
                    break


def verify(p: Tensor, q: Tensor, proposals: Tensor, uniforms: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Which proposals stand, and the token that follows them.

    A proposal x ~ q stands with probability min(1, p(x) / q(x)). In the place of the first that does not comes a draw
    from max(0, p - q), up to a factor: so each token is distributed as p (Leviathan et al. 2023, appendix A.1). After
    the last comes a draw from p.

    Args:
        p: [B, K + 1, V] float32, the model's probabilities at each proposal's place and after them.
        q: [B, K + 1, V] float32, those from which the proposals were drawn; 0 after them, where nothing was proposed.
        proposals: [B, K] int64, K >= 0.
        uniforms: [B, K] float32 in [0, 1), independent.
        times: [B, V] float32, `sampling.exponentials`.

    Returns:
        [B] int64, how many proposals stand, 0 to K; [B] int64, the token after them.
    """
    chosen = proposals[..., None]  # [B, K, 1]
    # a product, and strictly less: a token of probability 0 never stands, one with p = q always does
    stands = uniforms * q[:, :-1].gather(2, chosen)[..., 0] < p[:, :-1].gather(2, chosen)[..., 0]  # [B, K]
    accepted = _leading(stands)
    place = accepted[:, None, None].expand(-1, 1, p.shape[2])  # [B, 1, V]
    p, q = p.gather(1, place)[:, 0], q.gather(1, place)[:, 0]  # [B, V] each
    left = (p - q).clamp(min=0.0)
    # rounding may leave nothing of two distributions that are as good as equal
    left = torch.where(left.sum(-1, keepdim=True) > 0.0, left, p)
    return accepted, _race(left, times)


def _leading(stands: Tensor) -> Tensor:
    """How many of each row [B, K] are true before the first that is not, [B] int64."""
    return stands.long().cumprod(1).sum(1)


def _race(weights: Tensor, times: Tensor) -> Tensor:
    """`sampling.exponential_race` of probabilities [B, V], up to a factor, in the place of their logarithms."""
    return (weights / times).argmax(-1)


class _Reader:
    """A model, and the keys and values of those tokens of a sequence that it has read."""

    def __init__(self, model: GPT, longest: int, new_tokens: int) -> None:
        self.window = model.config.block_size
        self._model = for_decoding(model, new_tokens)
        self._cache = KVCache(model.config.n_layer, min(self.window, longest))

    def read(self, tokens: Tensor, end: int, count: int) -> Tensor:
        """Read the first `end` of the tokens [1, T], of which most were read before.

        Beyond the model's window, the last `block_size` of them anew: positions are counted from the window's start.

        Returns:
            [count, V], the logits that follow each of the last `count`.
        """
        start = max(0, end - self.window)
        if start > 0:
            self._cache.clear()
        last: list[Tensor] = []  # one, [1, at most count, C]
        for first in range(start + self._cache.length, end, decoding.CHUNK):
            x = self._model.transformer(tokens[:, first : min(first + decoding.CHUNK, end)], self._cache)
            last = [torch.cat((*last, x), dim=1)[:, -count:]]
        return self._model.logits(last[0][0])

    def keep(self, length: int) -> None:
        """Forget what was read beyond the first `length` tokens."""
        self._cache.shorten(min(self._cache.length, length))

    def clear(self) -> None:
        """Go on with another sequence."""
        self._cache.clear()


class _Round(NamedTuple):
    """What the host is told of a round with K proposals."""

    accepted: int
    tokens: list[int]  # K + 1, of which the first `accepted` + 1 count
    log_probs: list[float]  # of each
    largest: list[float]  # logits at each place, from which it is seen whether there is a distribution at all
    draft_largest: list[float]  # K


class _Sequence:
    """A prompt with its continuation.

    Args:
        prompt: [1, T] int64.
        max_new_tokens: the most that is added.
        settings: how tokens are drawn.
        generator: what they are drawn from; PyTorch's own if None.
    """

    def __init__(
        self, prompt: Tensor, max_new_tokens: int, settings: Sampling, generator: torch.Generator | None
    ) -> None:
        self.length = prompt.shape[1]  # tokens of prompt and continuation that are certain
        self._tokens = F.pad(prompt, (0, max_new_tokens))
        self._prompts = torch.full((1,), self.length, device=prompt.device)
        self._settings, self._generator = settings, generator
        self._greedy = settings.temperature == 0.0

    def round(self, target: _Reader, proposer: _Reader, count: int, log_probs: bool) -> _Round:
        """Add the proposals that stand and the token after them, `count` + 1 at the most.

        All is done on the device, but for one copy to the host at the end.
        """
        begin, end = self.length, self.length + count
        before = torch.arange(begin, end + 1, device=self._tokens.device)  # [K + 1], tokens before each place
        drawn_from, draft_largest = self._propose(proposer, before[:-1])
        logits = target.read(self._tokens, end, count + 1)  # [K + 1, V]
        accepted = self._accept(self._processed(logits, before), drawn_from)
        tokens = self._tokens[0, begin : end + 1]
        found = log_softmax_of(logits, tokens) if log_probs else torch.zeros(count + 1, device=tokens.device)
        told = _told(accepted, tokens, found, logits.amax(-1), *draft_largest)
        self.length = begin + told.accepted + 1
        # the last token is yet to be read by both; by the draft also the one before, if that was its last proposal
        target.keep(self.length - 1)
        proposer.keep(self.length - 1)
        return told

    def _propose(self, proposer: _Reader, before: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Add K tokens, of which the first has `before[0]` before it.

        Returns:
            What each was drawn from, [1, V]; with temperature 0 nothing. The largest logit at each place, [1].
        """
        drawn_from, largest = [], []
        for number in range(len(before)):
            end = self.length + number
            logits = proposer.read(self._tokens, end, 1)  # [1, V]
            largest.append(logits.amax(-1))
            left = self._processed(logits, before[number : number + 1])
            if self._greedy:
                self._tokens[:, end] = left.argmax(-1)
            else:
                drawn_from.append(self._probabilities(left))
                self._tokens[:, end] = _race(drawn_from[-1], self._times(left))
        return drawn_from, largest

    def _accept(self, logits: Tensor, drawn_from: list[Tensor]) -> Tensor:
        """How many proposals stand by processed logits [K + 1, V], [1]; the token that follows them is written."""
        begin, end = self.length, self.length + len(logits) - 1
        proposals = self._tokens[:, begin:end]  # [1, K]
        if self._greedy:
            likeliest = logits.argmax(-1)[None]  # [1, K + 1]
            accepted = _leading(proposals == likeliest[:, :-1])
            self._tokens[:, begin : end + 1] = likeliest  # as are those that stand
            return accepted
        p = self._probabilities(logits)
        q = torch.cat((*drawn_from, torch.zeros_like(p[:1])))  # [K + 1, V]
        uniforms = torch.rand(proposals.shape, generator=self._generator, device=p.device)
        accepted, token = verify(p[None], q[None], proposals, uniforms, self._times(p[:1]))
        self._tokens.scatter_(1, (begin + accepted)[:, None], token[:, None])
        return accepted

    def _processed(self, logits: Tensor, before: Tensor) -> Tensor:
        """Logits [R, V] at places with `before` [R] tokens before them, as these tokens change them; float32."""
        sequences, prompts = self._tokens.expand(len(logits), -1), self._prompts.expand(len(logits))
        return sampling.process(logits.float(), sequences, before, prompts, self._settings)

    def _probabilities(self, logits: Tensor) -> Tensor:
        return sampling.filtered(logits, self._settings).softmax(-1)

    def _times(self, logits: Tensor) -> Tensor:
        return sampling.exponentials(logits, self._generator)


def _told(accepted: Tensor, tokens: Tensor, *values: Tensor) -> _Round:
    """`accepted` [1], `tokens` [K + 1] and float values, by one copy: a copy waits for the device."""
    bits = [value.float().view(torch.int32) for value in values]
    told = torch.cat((accepted.int(), tokens.int(), *bits)).cpu()
    number = len(tokens)
    integers, numbers = told[: 1 + number].tolist(), told[1 + number :].view(torch.float32).tolist()
    return _Round(integers[0], integers[1:], numbers[:number], numbers[number : 2 * number], numbers[2 * number :])


def _continued(
    sequence: _Sequence, target: _Reader, proposer: _Reader, draft: Draft, max_new_tokens: int, log_probs: bool
) -> Iterator[tuple[int, float]]:
    """New tokens of a sequence and their log-probabilities, round by round."""
    target.clear()
    proposer.clear()
    last = sequence.length + max_new_tokens
    while sequence.length < last:
        # the target reads the last token and all proposals, the draft all of these but the last
        room = min(target.window - sequence.length, proposer.window + 1 - sequence.length)
        count = max(0, min(draft.tokens, room, last - sequence.length - 1))
        told = sequence.round(target, proposer, count, log_probs)
        draft.proposed += count
        draft.accepted += told.accepted
        try:
            sampling.require_finite(told.draft_largest)
        except ValueError as error:
            raise ValueError(f"draft.model: {error}") from None
        for number in range(told.accepted + 1):
            sampling.require_finite(told.largest[number : number + 1])
            yield told.tokens[number], told.log_probs[number]


def _require_pair(model: GPT, draft: GPT) -> None:
    vocabulary, wanted = draft.config.vocab_size, model.config.vocab_size
    if vocabulary != wanted:
        raise ValueError(
            f"draft.model has a vocabulary of {vocabulary} tokens, the model one of {wanted}; speculative decoding "
            "needs two models of one tokenizer"
        )
    device, there = draft.transformer.wte.weight.device, model.transformer.wte.weight.device
    if device != there:
        raise ValueError(f"draft.model is on {device}, the model on {there}; move one to the other")
