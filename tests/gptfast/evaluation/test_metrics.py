"""Means and their standard errors. Perplexity and bits per byte are tested in test_perplexity.py."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptfast.evaluation import metrics
from gptfast.evaluation.metrics import Estimate


def test_mean_of_single_items_has_the_sample_standard_error():
    values = np.random.default_rng(0).normal(size=50)
    found = metrics.mean(values.tolist())
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)
    # lm-evaluation-harness gives the share p of n answers sqrt(p (1 - p) / (n - 1))
    assert metrics.mean([1.0] * 30 + [0.0] * 70).stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_mean_of_clusters_of_one_size_is_that_of_their_means():
    sums = np.random.default_rng(1).normal(3.0, size=20)
    found, of_means = metrics.mean(sums.tolist(), [8] * 20), metrics.mean((sums / 8).tolist())
    assert found.value == pytest.approx(of_means.value, rel=1e-12)
    assert found.stderr == pytest.approx(of_means.stderr, rel=1e-12)


def test_mean_weights_clusters_by_their_size():
    found = metrics.mean([10.0, 1.0], [9, 1])
    assert found.value == pytest.approx(1.1)
    # residuals: 10 - 9 * 1.1 and 1 - 1.1
    assert found.stderr == pytest.approx(math.sqrt(2 / 1 * (0.1**2 + 0.1**2)) / 10)


def test_mean_standard_error_is_the_spread_of_many_samples():
    """Clusters differ in size and vary as wholes, as windows of a text do."""
    generator = np.random.default_rng(2)

    def sample() -> tuple[list[float], list[int]]:
        counts = generator.integers(1, 20, size=60)
        return (counts * generator.normal(2.0, 0.5, size=60)).tolist(), counts.tolist()

    found = [metrics.mean(*sample()) for _ in range(2000)]
    spread = np.std([one.value for one in found])
    assert np.mean([one.stderr for one in found]) == pytest.approx(spread, rel=0.1)
    inside = [low < 2.0 < high for low, high in (one.interval for one in found)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_mean_of_one_cluster_has_no_standard_error():
    found = metrics.mean([6.0], [4])
    assert (found.value, found.stderr, found.interval) == (1.5, None, None)


def test_mean_sums_exactly():
    assert metrics.mean([1e16, 1.0, -1e16, 1.0]).value == 0.5


def test_fields_name_value_error_and_interval():
    assert Estimate(2.0, 0.1).interval == pytest.approx((1.804, 2.196), abs=1e-4)
    fields = metrics.fields("acc", Estimate(2.0, 0.1))
    assert fields == {"acc": 2.0, "acc_stderr": 0.1, "acc_interval": Estimate(2.0, 0.1).interval}
    assert metrics.fields("acc", None) == dict.fromkeys(fields)
