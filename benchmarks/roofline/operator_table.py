"""Cost of each operator and its lower bound on time: `python -m benchmarks.roofline.operator_table`.

What docs/operators.md holds between its markers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from benchmarks.measuring import operator_cases
from benchmarks.measuring.operator_bench import Case
from benchmarks.measuring.operator_providers import PROVIDERS
from benchmarks.reporting.markdown import grid
from benchmarks.roofline.__main__ import gpu_named, matrix_peak
from gptfast.hardware import GPU

START, END = "<!-- operators:start -->", "<!-- operators:end -->"
# the first case of each suite, the one that says most; `ffn_up` is a part of an operator
CASES = [cases[0] for suite, cases in operator_cases.SUITES.items() if suite != "ffn_up"]


@dataclass
class Options:
    """Print what each operator computes and moves, and how long that takes at least."""

    gpu: str = "H200 SXM"
    """Name of a GPU in the table of `gptfast.hardware`."""


def main() -> None:
    """Print the table; exit status 2 for an unknown GPU, or one without a known peak in bfloat16."""
    options = tyro.cli(Options)
    try:
        print(table(gpu_named(options.gpu)), end="")
    except ValueError as error:
        print(f"benchmarks.roofline.operator_table: {error}", file=sys.stderr)
        sys.exit(2)


def table(gpu: GPU) -> str:
    """The table in Markdown.

    Raises:
        ValueError: a GPU whose matrix peak in bfloat16 is not known.
    """
    lines = [line for case in CASES for line in _lines(case, gpu)]
    return grid(("operator", "shape", "pass", "GFLOP", "MB", "least time", "bound by"), lines) + "\n"


def _lines(case: Case, gpu: GPU) -> list[tuple[str, ...]]:
    """A line for the forward, and one for the backward of what has one of its own."""
    peak = matrix_peak(gpu, case.dtype)
    if peak is None:
        raise ValueError(f"no matrix peak in {case.dtype_name} is known of {gpu.name}")
    sizes = " ".join(f"{name}={size:,}" for name, size in case.dims.items())
    lines: list[tuple[str, ...]] = []
    modes = PROVIDERS[case.suite]["triton"].modes
    for mode in modes:
        if mode == "both" and "backward" in modes:
            continue  # the sum of the two
        cost = case.cost(mode)
        seconds = cost.seconds(peak, gpu.bandwidth)
        first = (f"`{case.suite}`", sizes) if mode == "forward" else ("", "")
        amounts = (f"{cost.flops / 1e9:,.1f}", f"{cost.bytes / 1e6:,.0f}", f"{1e6 * seconds:,.0f} us")
        lines.append(
            (*first, "forward and backward" if mode == "both" else mode, *amounts, cost.bound(peak, gpu.bandwidth))
        )
    return lines


if __name__ == "__main__":
    main()
