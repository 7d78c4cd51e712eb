"""From a model's logits to the next token: penalties, filters and the draw, none of which waits for the device.

The order is that of Hugging Face (transformers, `GenerationMixin._get_logits_processor`): `penalize`, `block_ngrams`,
then `draw`, which filters by temperature, top-k, top-p, min-p and typical-p. Each step sees what those before it left.

Python branches on settings and shapes alone, so that all but `check` can be compiled as one graph and captured in a
CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

_ABOVE_0 = math.ulp(0.0)
_LARGEST_PENALTY = 100.0  # as good as forbidding a token, and far from where float32 ends
_HOTTEST = 2.0**126  # as good as infinite; -inf / inf would be NaN, and so would -inf * (1 / _HOTTEST) if that were 0


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Every filter keeps at least one token, and what it drops is never drawn.

    With temperature 0 top_k, top_p, min_p and typical_p are accepted and change nothing: the temperature comes first
    and leaves them one token.

    Raises:
        ValueError: a setting out of range, or of another type.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together have this probability (nucleus sampling)."""
    min_p: float | None = None
    """Sample among tokens that have at least this share of the likeliest token's probability."""
    typical_p: float | None = None
    """Sample among the tokens nearest to the expected information that together have this probability."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that the prompt or the continuation has; 1 is none, more avoids them."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the continuation has; the prompt does not count."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that the continuation has it; the prompt does not count."""
    no_repeat_ngram_size: int = 0
    """Sequences of this many tokens, of prompt and continuation, occur only once; 0 is no limit."""

    @property
    def looks_back(self) -> bool:
        """Whether it depends on the tokens before."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or self.no_repeat_ngram_size > 0

    def __post_init__(self) -> None:
        _real("temperature", self.temperature, 0.0, math.inf, "at least 0 and finite")
        if self.top_k is not None:
            _integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            _mass("top_p", self.top_p)
        if self.min_p is not None:
            _real("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        if self.typical_p is not None:
            _mass("typical_p", self.typical_p)
        lowest = 1.0 / _LARGEST_PENALTY
        _real("repetition_penalty", self.repetition_penalty, lowest, _LARGEST_PENALTY, "in [0.01, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            _real(name, getattr(self, name), -_LARGEST_PENALTY, _LARGEST_PENALTY, "in [-100, 100]")
        _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)


def process(logits: Tensor, sequences: Tensor, lengths: Tensor, prompt_lengths: Tensor, sampling: Sampling) -> Tensor:
    """`penalize`, then `block_ngrams`: what depends on the tokens before. Arguments and result are `penalize`'s."""
    if not sampling.looks_back:
        return logits
    logits = penalize(logits, sequences, lengths, prompt_lengths, sampling)
    if sampling.no_repeat_ngram_size:
        logits = block_ngrams(logits, sequences, lengths, sampling.no_repeat_ngram_size)
    return logits


def penalize(logits: Tensor, sequences: Tensor, lengths: Tensor, prompt_lengths: Tensor, sampling: Sampling) -> Tensor:
    """Lower, or with settings of the other sign raise, the logits of tokens that were there before.

    First `repetition_penalty` r: positive logits are divided by r and negative ones multiplied, for each token of
    prompt or continuation, however often it occurs (Keskar et al. 2019, arXiv:1909.05858, section 4.1, which divides
    negative ones too; that would raise them). Then f * count + p * (count > 0) is subtracted, with `frequency_penalty`
    f, `presence_penalty` p, and the count in the continuation alone (as defined by OpenAI's API).

    Args:
        logits: [B, V] float32.
        sequences: [B, T] int64, prompt and continuation, padded at the end with anything.
        lengths: [B] int64, how many of T are tokens; these are in [0, V).
        prompt_lengths: [B] int64, how many of these the prompt has.
        sampling: the three penalties are read.

    Returns:
        [B, V] float32; -inf stays -inf.
    """
    places = torch.arange(sequences.shape[1], device=sequences.device)
    tokens = places < lengths[:, None]  # [B, T]
    if sampling.repetition_penalty != 1.0:
        seen = _counts(sequences, tokens, logits.shape[-1]) > 0.0
        lower = torch.where(logits < 0.0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, lower, logits)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        counts = _counts(sequences, tokens & (places >= prompt_lengths[:, None]), logits.shape[-1])
        logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0.0)
    return logits


def block_ngrams(logits: Tensor, sequences: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Exclude the tokens that would end a sequence of `size` tokens which is there already.

    As in fairseq's and Hugging Face's `no_repeat_ngram_size` (Paulus et al. 2017, arXiv:1705.04304, section 2.5, for
    trigrams), but for rows in which no token would be left: these stay as they are.

    Args:
        logits: [B, V] float32.
        sequences: [B, T] int64, prompt and continuation, padded at the end with anything.
        lengths: [B] int64, how many of T are tokens; these are in [0, V).
        size: tokens that may not occur again in this order, at least 1.

    Returns:
        [B, V] float32, -inf where blocked.

    Raises:
        ValueError: a size out of range.
    """
    _integer("size", size, 1)
    if sequences.shape[1] < size:
        return logits
    device, vocabulary = logits.device, logits.shape[-1]
    windows = sequences.unfold(1, size, 1)  # [B, T - size + 1, size]
    ends = torch.arange(size, sequences.shape[1] + 1, device=device)
    last = lengths[:, None] + torch.arange(1 - size, 0, device=device)  # [B, size - 1]
    begun = sequences.gather(1, last.clamp(min=0))  # of rows too short for a window it means nothing, nor is it used
    again = (ends <= lengths[:, None]) & (windows[..., :-1] == begun[:, None]).all(dim=-1)
    blocked = torch.zeros(len(logits), vocabulary + 1, dtype=torch.bool, device=device)  # one more for all else
    blocked = blocked.scatter(1, windows[..., -1].masked_fill(~again, vocabulary), True)[:, :-1]
    remaining = logits.masked_fill(blocked, -math.inf)
    return torch.where((remaining > -math.inf).any(dim=-1, keepdim=True), remaining, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and those equal to the least of them (Fan et al. 2018, arXiv:1805.04833, section 5.4).

    Args:
        logits: [B, V] float32.
        k: at least 1; beyond V it keeps all.

    Returns:
        [B, V] float32, -inf for all others.

    Raises:
        ValueError: k out of range.
    """
    _integer("top_k", k, 1)
    kth_best = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < kth_best, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus: as few as possible of the likeliest tokens, such that their probabilities add up to p or more.

    Of equal logits those of lower ids come first. Holtzman et al. 2019, arXiv:1904.09751, section 3.1.

    Args:
        logits: [B, V] float32.
        p: in (0, 1].

    Returns:
        [B, V] float32, -inf for all others.

    Raises:
        ValueError: p out of range.
    """
    _mass("top_p", p)
    return _keep_first(logits, logits.argsort(dim=-1, descending=True, stable=True), p)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as probable as the likeliest (Nguyen et al. 2024, arXiv:2407.01082, section 3).

    Args:
        logits: [B, V] float32.
        p: in [0, 1]; 0 keeps all.

    Returns:
        [B, V] float32, -inf for all others.

    Raises:
        ValueError: p out of range.
    """
    _real("min_p", p, 0.0, 1.0, "in [0, 1]")
    if p == 0.0:
        return logits
    # in logarithms, in which small probabilities are no 0
    return logits.masked_fill(logits - logits.amax(dim=-1, keepdim=True) < math.log(p), -math.inf)


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """Keep the locally typical tokens: those whose information -log p_i is nearest to the entropy, its expectation.

    As few as possible, such that their probabilities add up to p or more; of equally near ones those of lower ids come
    first. The likeliest token may not be among them. Meister et al. 2022, arXiv:2202.00666, locally typical sampling.

    Args:
        logits: [B, V] float32.
        p: in (0, 1].

    Returns:
        [B, V] float32, -inf for all others.

    Raises:
        ValueError: p out of range.
    """
    _mass("typical_p", p)
    information = -logits.log_softmax(dim=-1)
    entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1, keepdim=True)  # 0 where the probability is 0
    return _keep_first(logits, (information - entropy).abs().argsort(dim=-1, stable=True), p)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits of the distribution to draw from: temperature, then top-k, top-p, min-p and typical-p, as Hugging Face.

    Temperature 0 leaves the likeliest token alone, of equal ones the first. Any other is exact down to the smallest
    floats, where several equally likely tokens remain.

    Args:
        logits: [B, V], V >= 1, of any floating dtype; -inf is never drawn.
        sampling: the temperature and the four filters are read.

    Returns:
        [B, V] float32 relative to the row's largest logit, which is 0: at least one is finite, -inf is never drawn.
        A row that `check` refuses is refused after it too.

    Raises:
        ValueError: a shape other than [B, V].
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [B, V] with V >= 1, got shape {tuple(logits.shape)}")
    logits = logits.float()
    below = logits - logits.amax(dim=-1, keepdim=True)
    if sampling.temperature == 0.0:
        likeliest = torch.zeros_like(below, dtype=torch.bool).scatter(1, logits.argmax(dim=-1, keepdim=True), True)
        return below.masked_fill(~likeliest, -math.inf)
    # below the largest logit, so that a small temperature divides to 0 and -inf, not to inf; 0 / 0 where it underflows
    logits = (below / min(sampling.temperature, _HOTTEST)).masked_fill(below == 0.0, 0.0)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    if sampling.typical_p is not None:
        logits = keep_typical(logits, sampling.typical_p)
    return logits


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """One token per row, from softmax(`filtered(logits, sampling)`): an `exponential_race`, or at temperature 0 argmax.

    torch.compile takes no generator: compile `choose`, and draw `exponentials` outside, or draw without one. A CUDA
    graph must be told of it (`CUDAGraph.register_generator_state`) to draw anew at each replay.

    Args:
        logits: [B, V], V >= 1, of any floating dtype; -inf is never drawn.
        sampling: the temperature and the four filters are read; see `penalize` and `block_ngrams` for the others.
        generator: makes the draws repeatable; on the device of `logits`.

    Returns:
        [B] int64 in [0, V). It means nothing for a row that `check` refuses, which only the host could raise for.

    Raises:
        ValueError: a shape other than [B, V].
    """
    noise = None if sampling.temperature == 0.0 else exponentials(logits, generator)
    return choose(logits, noise, sampling)


def choose(logits: Tensor, times: Tensor | None, sampling: Sampling) -> Tensor:
    """`draw` with the `exponentials` [B, V] of these logits given; None at temperature 0, which draws nothing."""
    kept = filtered(logits, sampling)
    return kept.argmax(dim=-1) if times is None else exponential_race(kept, times)


def exponentials(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent draws of Exp(1), one for each logit [B, V], as [B, V] float32 and above 0."""
    # some devices' generators return 0, and 0 / 0 would win; 1 / tiny is finite
    tiny = torch.finfo(torch.float32).tiny
    return torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).clamp_(min=tiny)


def exponential_race(logits: Tensor, times: Tensor) -> Tensor:
    """The first of each row to arrive, when token i takes the time e_i / p_i with p = softmax(logits), e_i ~ Exp(1).

    e_i / p_i is exponential with the rate p_i, and of independent exponentials the first is i with probability
    p_i / sum(p): so this is a draw from p (Maddison et al. 2014, arXiv:1411.0030, has it in logarithms, as
    Gumbel-max). `torch.multinomial` draws one sample in this way too, but first waits for the device to check p.

    Args:
        logits: [B, V] float32; -inf never wins.
        times: [B, V] float32, `exponentials`.

    Returns:
        [B] int64, argmax(p / e).
    """
    return (logits.softmax(dim=-1) / times).argmax(dim=-1)


def check(logits: Tensor) -> None:
    """Find rows that no token can be drawn of. It waits for the device: for the CPU, and for looking into failures.

    Args:
        logits: [B, V], V >= 1, before or after filters.

    Raises:
        ValueError: a row with NaN or inf, or with nothing but -inf; it names the first.
    """
    require_finite(logits.amax(dim=-1).tolist())


def require_finite(largest: Sequence[float]) -> None:
    """`check` of logits whose largest of each row is given, as the host has it.

    Raises:
        ValueError: as `check`.
    """
    for row, value in enumerate(largest):
        if not math.isfinite(value):
            found = "NaN" if math.isnan(value) else "inf" if value > 0.0 else "-inf alone"
            raise ValueError(f"row {row} of the logits has {found}; accepted: finite logits, at least one, and -inf")


def _counts(sequences: Tensor, counted: Tensor, vocabulary: int) -> Tensor:
    """How often each token of a vocabulary is in `sequences` [B, T] where `counted` [B, T]: [B, V] float32."""
    counts = torch.zeros(len(sequences), vocabulary + 1, device=sequences.device)  # one more for all that is not
    return counts.scatter_add(1, sequences.masked_fill(~counted, vocabulary), counted.float())[:, :-1]


def _keep_first(logits: Tensor, order: Tensor, mass: float) -> Tensor:
    """Keep the first tokens in `order` [B, V], up to the one with which their probabilities reach `mass`."""
    reached = logits.softmax(dim=-1).gather(1, order).cumsum(dim=-1) >= mass
    # by what those before it add up to: the first is always kept
    kept = F.pad(~reached[:, :-1], (1, 0), value=True)
    return logits.masked_fill(~torch.empty_like(kept).scatter(1, order, kept), -math.inf)


def _mass(name: str, value: float) -> None:
    _real(name, value, _ABOVE_0, 1.0, "above 0 and at most 1")


def _real(name: str, value: float, low: float, high: float, accepted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def _integer(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
