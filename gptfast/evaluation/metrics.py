"""Means with standard errors, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z_95 = 1.959963984540054  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A mean over a sample.

    Args:
        value: sample mean.
        stderr: standard error; None for a sample of one.
    """

    value: float
    stderr: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the population mean."""
        if self.stderr is None:
            return None
        return self.value - _Z_95 * self.stderr, self.value + _Z_95 * self.stderr

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate in another unit."""
        return Estimate(self.value * factor, None if self.stderr is None else self.stderr * factor)


def fields(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """Return value, standard error and interval as JSON fields, all None without an estimate."""
    parts = (None, None, None) if estimate is None else (estimate.value, estimate.stderr, estimate.interval)
    return dict(zip((name, f"{name}_stderr", f"{name}_interval"), parts, strict=True))


def mean(sums: Sequence[float], counts: Sequence[int] | None = None) -> Estimate:
    """Estimate the mean per item from a sample of clusters of items.

    The standard error is that of a ratio estimate (Cochran 1977, Sampling Techniques, chapter 6). For clusters of equal
    size it is the sample standard deviation of their means over the square root of their number.

    Args:
        sums: [K] sum over each cluster, K at least 1.
        counts: [K] items in each cluster, at least 1; None for one item each.
    """
    counts = [1] * len(sums) if counts is None else counts
    clusters, items = len(sums), sum(counts)
    value = math.fsum(sums) / items
    if clusters == 1:
        return Estimate(value, None)
    residuals = np.asarray(sums, dtype=np.float64) - value * np.asarray(counts)  # [K]
    return Estimate(value, math.sqrt(clusters / (clusters - 1) * math.fsum(residuals * residuals)) / items)


def perplexity(loss: float) -> float:
    """Return the perplexity of a mean loss in nats per token, infinity where it overflows a float."""
    return math.exp(loss) if loss < 700.0 else math.inf


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Convert a mean loss in nats per token to bits per byte of text, which does not depend on the tokenizer."""
    return loss / math.log(2.0) / bytes_per_token
