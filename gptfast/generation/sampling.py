"""Sampling: penalties, filters and the draw of a token from logits.

The order is that of Hugging Face's `GenerationMixin._get_logits_processor`: penalties, n-gram blocking, temperature,
top-k, top-p, min-p, typical-p. Python branches on settings and shapes alone, so CUDA graphs and `torch.compile` can
capture everything here but `require_finite`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

_LARGEST_PENALTY = 100.0  # in effect forbids a token, and is far from float32's limits
_HOTTEST = 2.0**126  # in effect infinite; beyond it -inf / temperature would be NaN


@dataclass(frozen=True)
class Sampling:
    """Settings of the draw of a token. Every filter keeps at least one token, and removed tokens are never drawn.

    With temperature 0 the filters change nothing: temperature is applied first and leaves them one token.

    Raises:
        ValueError: a setting has another type or is out of range.
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
    """Sample among the most typical tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens in the prompt or the continuation; 1 is off, larger values avoid repetition."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the continuation; the prompt does not count."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once per occurrence in the continuation; the prompt does not count."""
    no_repeat_ngram_size: int = 0
    """Sequences of this many tokens occur only once in prompt and continuation; 0 is off."""

    @property
    def needs_history(self) -> bool:
        """True if logits depend on the tokens before, by a penalty or n-gram blocking."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or self.no_repeat_ngram_size > 0

    def __post_init__(self) -> None:
        _require_real("temperature", self.temperature, 0.0, math.inf, "at least 0 and finite")
        if self.top_k is not None:
            require_integer("top_k", self.top_k, 1)
        if self.min_p is not None:
            _require_real("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        for name in ("top_p", "typical_p"):
            if (value := getattr(self, name)) is not None:
                _require_real(name, value, math.ulp(0.0), 1.0, "above 0 and at most 1")
        lowest = 1.0 / _LARGEST_PENALTY
        _require_real("repetition_penalty", self.repetition_penalty, lowest, _LARGEST_PENALTY, "in [0.01, 100]")
        for name in ("presence_penalty", "frequency_penalty"):
            _require_real(name, getattr(self, name), -_LARGEST_PENALTY, _LARGEST_PENALTY, "in [-100, 100]")
        require_integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)


def process_logits(
    logits: Tensor, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, sampling: Sampling
) -> Tensor:
    """Apply `penalize`, then `block_ngrams`: all settings that need history. Arguments are those of `penalize`."""
    if not sampling.needs_history:
        return logits
    logits = penalize(logits, tokens, lengths, prompt_lengths, sampling)
    if sampling.no_repeat_ngram_size:
        logits = block_ngrams(logits, tokens, lengths, sampling.no_repeat_ngram_size)
    return logits


def penalize(logits: Tensor, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, sampling: Sampling) -> Tensor:
    """Lower the logits of tokens that occurred before.

    First `repetition_penalty` r, for each token of prompt or continuation: positive logits are divided by r, negative
    ones multiplied (Keskar et al. 2019, arXiv:1909.05858, section 4.1, divides both; that would raise negative ones).
    Then f * count + p * (count > 0) is subtracted, with `frequency_penalty` f, `presence_penalty` p and counts in the
    continuation (as OpenAI's API defines them).

    Args:
        logits: [B, V] float32.
        tokens: [B, T] int64, prompt and continuation, with any padding behind them.
        lengths: [B] int64, tokens in each row before the padding; these are in [0, V).
        prompt_lengths: [B] int64, how many of them are the prompt's.
        sampling: the three penalties are read.

    Returns:
        [B, V] float32; -inf stays -inf.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    valid = positions < lengths[:, None]  # [B, T]
    if sampling.repetition_penalty != 1.0:
        seen = _counts(tokens, valid, logits.shape[-1]) > 0.0
        lower = torch.where(logits < 0.0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = torch.where(seen, lower, logits)
    if sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0:
        counts = _counts(tokens, valid & (positions >= prompt_lengths[:, None]), logits.shape[-1])
        logits = logits - sampling.frequency_penalty * counts - sampling.presence_penalty * (counts > 0.0)
    return logits


def _counts(tokens: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
    """Occurrences of each token in `tokens` [B, T] where `counted` [B, T]: [B, V] float32."""
    counts = torch.zeros(len(tokens), vocab_size + 1, device=tokens.device)  # the last column takes the others
    return counts.scatter_add(1, tokens.masked_fill(~counted, vocab_size), counted.float())[:, :-1]


def block_ngrams(logits: Tensor, tokens: Tensor, lengths: Tensor, size: int) -> Tensor:
    """Exclude the tokens that would repeat a sequence of `size` tokens.

    As `no_repeat_ngram_size` of fairseq and Hugging Face (Paulus et al. 2017, arXiv:1705.04304, section 2.5, for
    trigrams), except for rows without a remaining token, which stay as they are.

    Args:
        logits: [B, V] float32.
        tokens: [B, T] int64, as in `penalize`.
        lengths: [B] int64, as in `penalize`.
        size: at least 1.

    Returns:
        [B, V] float32, -inf where blocked.
    """
    if tokens.shape[1] < size:
        return logits
    device, vocab_size = logits.device, logits.shape[-1]
    windows = tokens.unfold(1, size, 1)  # [B, T - size + 1, size]
    ends = torch.arange(size, tokens.shape[1] + 1, device=device)
    last = lengths[:, None] + torch.arange(1 - size, 0, device=device)  # [B, size - 1]
    prefix = tokens.gather(1, last.clamp(min=0))  # meaningless and unused in rows shorter than a window
    repeated = (ends <= lengths[:, None]) & (windows[..., :-1] == prefix[:, None]).all(dim=-1)
    blocked = torch.zeros(len(logits), vocab_size + 1, dtype=torch.bool, device=device)  # the last takes the others
    blocked = blocked.scatter(1, windows[..., -1].masked_fill(~repeated, vocab_size), True)[:, :-1]
    remaining = logits.masked_fill(blocked, -math.inf)
    return torch.where((remaining > -math.inf).any(dim=-1, keepdim=True), remaining, logits)


def filter_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply temperature, then top-k, top-p, min-p and typical-p, as Hugging Face does.

    Temperature 0 keeps the likeliest token alone, the first of equal ones. Other temperatures are exact down to the
    smallest floats, which keep all of several equally likely tokens.

    Args:
        logits: [B, V], V >= 1, of any floating dtype.
        sampling: the temperature and the four filters are read.

    Returns:
        [B, V] float32 relative to the row's largest logit, which is 0; -inf where removed. Rows that are not finite
        stay so, for `require_finite`.

    Raises:
        ValueError: another shape.
    """
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [B, V] with V >= 1, got shape {tuple(logits.shape)}")
    logits = logits.float()
    relative = logits - logits.amax(dim=-1, keepdim=True)
    if sampling.temperature == 0.0:
        likeliest = torch.zeros_like(relative, dtype=torch.bool).scatter(1, logits.argmax(dim=-1, keepdim=True), True)
        return relative.masked_fill(~likeliest, -math.inf)
    # relative logits divide to 0 and -inf by a small temperature, not to inf; 0 / 0 where the temperature underflows
    logits = (relative / min(sampling.temperature, _HOTTEST)).masked_fill(relative == 0.0, 0.0)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    if sampling.typical_p is not None:
        logits = keep_typical(logits, sampling.typical_p)
    return logits


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest of logits [B, V] and those equal to the least of them; the others become -inf.

    Fan et al. 2018, arXiv:1805.04833, section 5.4.
    """
    kth_best = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
    return logits.masked_fill(logits < kth_best, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the nucleus: the fewest of the likeliest tokens whose probabilities add up to p or more, p in (0, 1].

    Lower ids come first among equal logits. Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    return _keep_first(logits, logits.argsort(dim=-1, descending=True, stable=True), p)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as probable as the likeliest, p in [0, 1]; 0 keeps all.

    Nguyen et al. 2024, arXiv:2407.01082, section 3.
    """
    if p == 0.0:
        return logits
    # compared as logarithms, because small probabilities underflow
    return logits.masked_fill(logits - logits.amax(dim=-1, keepdim=True) < math.log(p), -math.inf)


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """Keep the locally typical tokens, whose information -log p_i is nearest to the entropy, p in (0, 1].

    Keeps the fewest whose probabilities add up to p or more; lower ids come first among equally near ones. The
    likeliest token may be removed. Meister et al. 2022, arXiv:2202.00666.
    """
    information = -logits.log_softmax(dim=-1)
    entropy = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1, keepdim=True)  # 0 where the probability is 0
    return _keep_first(logits, (information - entropy).abs().argsort(dim=-1, stable=True), p)


def _keep_first(logits: Tensor, order: Tensor, p: float) -> Tensor:
    """Keep the first tokens in `order` [B, V], up to the one with which their probabilities reach p."""
    reached = logits.softmax(dim=-1).gather(1, order).cumsum(dim=-1) >= p
    kept = F.pad(~reached[:, :-1], (1, 0), value=True)  # by the sum before each, so the first is always kept
    return logits.masked_fill(~torch.empty_like(kept).scatter(1, order, kept), -math.inf)


def sample(logits: Tensor, noise: Tensor | None, sampling: Sampling) -> Tensor:
    """Draw one token per row from softmax(`filter_logits(logits, sampling)`), or take the likeliest at temperature 0.

    Args:
        logits: [B, V], V >= 1, of any floating dtype; -inf is never drawn.
        noise: [B, V] from `exponential_noise`; None at temperature 0.
        sampling: the temperature and the four filters are read.

    Returns:
        [B] int64 in [0, V), meaningless for rows that `require_finite` refuses.

    Raises:
        ValueError: another shape of the logits.
    """
    filtered = filter_logits(logits, sampling)
    return filtered.argmax(dim=-1) if noise is None else sample_from(filtered.softmax(dim=-1), noise)


def exponential_noise(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Independent draws of Exp(1), one for each of the logits [B, V]: [B, V] float32, above 0.

    Compiled code cannot draw from a generator: draw the noise outside and pass it in.
    """
    # some devices return 0, and 0 / 0 would win the race; 1 / tiny is finite
    tiny = torch.finfo(torch.float32).tiny
    return torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).clamp_(min=tiny)


def sample_from(weights: Tensor, noise: Tensor) -> Tensor:
    """Draw tokens [...] int64 from probabilities up to a factor [..., V] by the exponential race (Gumbel-max trick).

    With e_i ~ Exp(1), e_i / p_i is exponential with rate p_i, and the smallest is that of i with probability
    p_i / sum(p) (Maddison et al. 2014, arXiv:1411.0030, in logarithms). `torch.multinomial` does the same for one
    sample, but synchronises with the host to check p.
    """
    return (weights / noise).argmax(dim=-1)


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B] float32 of `tokens` [B] int64 under logits [B, V]."""
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def require_finite(largest: Sequence[float]) -> None:
    """Raise ValueError for rows of logits that have no distribution: with NaN or inf, or with nothing but -inf.

    Args:
        largest: the largest logit of each row, on the host.
    """
    for row, value in enumerate(largest):
        if not math.isfinite(value):
            found = "NaN" if math.isnan(value) else "inf" if value > 0.0 else "-inf alone"
            raise ValueError(f"row {row} of the logits has {found}; accepted: finite logits, at least one, and -inf")


def _require_real(name: str, value: float, low: float, high: float, accepted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high or value == math.inf:
        raise ValueError(f"{name} must be {accepted}, got {value!r}")


def require_integer(name: str, value: int, low: int) -> None:
    """Raise ValueError unless `value` is an integer and at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
