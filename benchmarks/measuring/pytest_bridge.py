"""Measured times on their way into pytest-benchmark.

Providers are timed in turns and by the GPU's clock, which pytest-benchmark cannot do itself. Each benchmark therefore
replays rounds that were already timed: pytest-benchmark calls a function that advances `MEASURED` by one round's
seconds, and reads that timer before and after. Its table, statistics and JSON then hold the measured times.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from benchmarks.measuring.bench import Bench, UnavailableError


class MeasuredTime:
    """Timer of pytest-benchmark that only `advance` moves."""

    __name__ = "measured"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


MEASURED = MeasuredTime()


def measure_each(cases: Iterable[Any]) -> Any:
    """Parametrize a test by the measurements of `cases`: arguments `bench`, a fixture, `mode` and `provider`."""
    parameters = [
        pytest.param(case, mode, provider, id=f"{case.test_id}-{mode}-{provider}")
        for case in cases
        for mode, provider in case.measurements()
    ]
    timer = pytest.mark.benchmark(timer=MEASURED)
    parametrize = pytest.mark.parametrize(("bench", "mode", "provider"), parameters, indirect=["bench"])
    return lambda test: timer(parametrize(test))


def record(benchmark: Any, bench: Bench, mode: str, provider: str) -> None:
    """Hand one provider's times and row to pytest-benchmark; skip with the reason what cannot run here."""
    try:
        times, row = bench.row(provider, mode)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{row['suite']} {row['case']} {mode}"
    benchmark.extra_info |= row
    rounds = iter(times.device)
    benchmark.pedantic(lambda: MEASURED.advance(next(rounds)), rounds=len(times.device))
