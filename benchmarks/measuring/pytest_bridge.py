"""Between our measurements and pytest-benchmark, whose tables, statistics and files hold the results."""

from __future__ import annotations

from typing import Any, Protocol

import pytest

from benchmarks.measuring.operator_bench import UnavailableError
from benchmarks.measuring.timing import Times


class ReplayClock:
    """A timer for pytest-benchmark that stands still but for what it is told, so that its statistics, tables and
    files hold the times measured here: pytest-benchmark itself can neither interleave nor ask the GPU for its time.
    """

    __name__ = "measured"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, seconds: list[float]) -> None:
        """Give the measured `seconds` to the fixture of pytest-benchmark, one round each."""
        following = iter(seconds)

        def advance() -> None:
            self.now = next(following)

        def rewind() -> None:
            self.now = 0.0

        benchmark.pedantic(advance, setup=rewind, rounds=len(seconds))


CLOCK = ReplayClock()


class Comparable(Protocol):
    """A case whose providers are measured in turn."""

    def row(self, name: str, mode: str) -> tuple[Times, dict[str, Any]]: ...

    def close(self) -> None: ...


class NoGPU:
    """Stands for a comparison of operators where they are not measured."""

    def row(self, name: str, mode: str) -> tuple[Times, dict[str, Any]]:
        raise UnavailableError("operators are measured on a CUDA GPU, and none was found")

    def close(self) -> None: ...


def case_id(case: object) -> str:
    """The name of a case in pytest's words: one that `-k` can select."""
    return str(case).replace("=", "").replace(" ", "-")


def report(benchmark: Any, comparison: Comparable, provider: str, mode: str) -> None:
    """Hand one row to pytest-benchmark. What cannot run here is skipped with its reason, what is wrong fails."""
    try:
        times, row = comparison.row(provider, mode)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{row['suite']} {row['case']} {mode}"
    benchmark.extra_info |= row
    CLOCK.replay(benchmark, times.device)
