"""Cost and least time of each operator, as in docs/operators.md: `python -m benchmarks.roofline.operator_table`."""

from __future__ import annotations

import kernels
from benchmarks.measuring.processes import run_command
from benchmarks.operators import OPERATORS
from benchmarks.reporting.markdown import grid
from benchmarks.roofline import gpu_named, matrix_peak
from gptfast.hardware import GPU


def main(gpu: str = "H200 SXM") -> None:
    """Print what each operator computes and moves, and its least time.

    Args:
        gpu: name of a GPU in the table of `gptfast.hardware`.
    """
    print(table(gpu_named(gpu)), end="")


def table(gpu: GPU) -> str:
    """Return the table in Markdown, the first case of each operator.

    Each has a line for its forward, and one for its backward or, without such a pass, for both.

    Raises:
        ValueError: the GPU's matrix peak in bfloat16 is unknown.
    """
    lines = []
    for case in (operator.cases[0] for name, operator in OPERATORS.items() if name in kernels.__all__):
        peak = matrix_peak(gpu, case.dtype)
        sizes = " ".join(f"{name}={size:,}" for name, size in case.dims.items())
        for mode in case.operator.modes[:2]:
            cost = case.cost(mode)
            lines.append(
                (
                    *((f"`{case.suite}`", sizes) if mode == "forward" else ("", "")),
                    "forward and backward" if mode == "both" else mode,
                    f"{cost.flops / 1e9:,.1f}",
                    f"{cost.bytes / 1e6:,.0f}",
                    f"{1e6 * cost.seconds(peak, gpu.bandwidth):,.0f} us",
                    cost.bound(peak, gpu.bandwidth),
                )
            )
    return grid(("operator", "shape", "pass", "GFLOP", "MB", "least time", "bound by"), lines) + "\n"


if __name__ == "__main__":
    run_command(main, "benchmarks.roofline.operator_table")
