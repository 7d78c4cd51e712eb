"""What losses and answers come to: perplexity, bits per byte, means and how far these can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_TWO_SIDED_95 = 1.959963984540054  # quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean, and what it would vary by from one sample to another.

    Args:
        value: the mean.
        stderr: its standard error, None where a single part tells nothing of it.
    """

    value: float
    stderr: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """In which the mean of everything that could have been sampled lies, with a confidence of 95 %."""
        if self.stderr is None:
            return None
        return self.value - _TWO_SIDED_95 * self.stderr, self.value + _TWO_SIDED_95 * self.stderr


def mean(sums: Sequence[float], counts: Sequence[int] | None = None) -> Estimate:
    """The mean of things that come in parts, which are what a sample is made of.

    Of parts of one size the standard error is the sample's standard deviation over the root of their number; of others
    that of a ratio (Cochran 1977, Sampling Techniques, chapter 6).

    Args:
        sums: [K] of each part, K at least 1.
        counts: [K] how many things a part has, at least 1; all have one if None.
    """
    parts, number = len(sums), len(sums) if counts is None else sum(counts)
    value = math.fsum(sums) / number
    if parts == 1:
        return Estimate(value, None)
    off = np.asarray(sums, dtype=np.float64) - value * np.asarray(1 if counts is None else counts)  # [K]
    return Estimate(value, math.sqrt(parts / (parts - 1) * math.fsum(off * off)) / number)


def perplexity(loss: float) -> float:
    """That of a mean loss in nats per token; infinite where it is too large for a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """What a mean loss in nats per token costs for each byte of text: a measure that tokenizers do not change."""
    return loss / math.log(2.0) / bytes_per_token
