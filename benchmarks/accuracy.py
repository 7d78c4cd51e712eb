"""Error of every operator against float64, next to that of eager PyTorch: `python -m benchmarks.accuracy`.

The results go to FOLDER/<device>/accuracy.json, which `benchmarks.report` accepts beside its own files. Without a GPU
the kernels run in Triton's interpreter (TRITON_INTERPRET=1), at small sizes and without bfloat16, which the interpreter
rounds differently from a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import machine
from benchmarks.measuring.bench import dtype_name, relative_error
from benchmarks.measuring.operator_bench import Case, Function, run
from benchmarks.measuring.processes import run_command
from benchmarks.operators import OPERATORS
from benchmarks.reporting.markdown import escape, grid
from kernels import runtime


def main(out: str) -> None:
    """Measure the error of every operator's results and gradients, and that of eager PyTorch, against float64.

    Args:
        out: folder of results; OUT/<device>/accuracy.json is written.
    """
    device = machine.default_device()
    reason = runtime.unsupported_reason(device)
    if reason is not None:
        raise ValueError(f"{reason}; set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter")
    interpreted = device.type != "cuda"
    dtypes = (torch.float32, torch.float16) if interpreted else (torch.float32, torch.float16, torch.bfloat16)
    rows = [row for dtype in dtypes for case in cases(dtype, interpreted) for row in errors(case, device)]
    content = {**machine.result_head(device), "interpreted": interpreted, "accuracy": rows}
    path = Path(out, machine.slug(device), "accuracy.json")
    machine.save_results(path, content)
    print(f"{passage(content)}\n{path}")


def cases(dtype: torch.dtype, interpreted: bool) -> list[Case]:
    """Return a case of each operator: GPT-2's sizes on a GPU, small ones for the interpreter."""
    return [
        operator.case(*operator.accuracy_sizes[interpreted], dtype=dtype)
        for operator in OPERATORS.values()
        if operator.accuracy_sizes is not None
    ]


def errors(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """Compute ||y - y64|| / ||y64|| of the kernel and of eager PyTorch, for each result and gradient of a case.

    Upstream gradients are random normal. Operators without a backward have no gradients here.
    """
    inputs = case.inputs(device)
    dy = case.upstream(inputs)

    def computed(function: Function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        return run(function, leaves, [one.to(dtype) for one in dy], case.operator.differentiable)

    exact = computed(case.reference, torch.float64)
    kernels, eagers = (computed(case.operator.providers[name].build(case), case.dtype) for name in ("triton", "eager"))
    names = [f"result {number}" if number else "result" for number in range(len(dy))]
    names += [f"gradient {number}" for number in range(len(exact) - len(dy))]
    for name, expected, kernel, eager in zip(names, exact, kernels, eagers, strict=True):
        yield {
            "operator": case.suite,
            "dims": dict(case.dims),
            "dtype": dtype_name(case.dtype),
            "of": name,
            "kernel": relative_error(kernel, expected),
            "eager": relative_error(eager, expected),
        }


def passage(content: dict[str, Any]) -> str:
    """Format results in Markdown: the worst result and gradient of each operator, and the machine."""
    lines = []
    for key in dict.fromkeys((row["operator"], row["dtype"]) for row in content["accuracy"]):
        rows = [row for row in content["accuracy"] if (row["operator"], row["dtype"]) == key]
        sizes = " ".join(f"{name}={size:,}" for name, size in rows[0]["dims"].items())
        lines.append((f"`{key[0]}`", sizes, key[1], *_cells(rows, "result"), *_cells(rows, "gradient")))
    measured_on = content["machine_info"]["gptfast"]
    where = "in Triton's interpreter, " if content["interpreted"] else ""
    columns = ("operator", "shape", "dtype", "result: kernel", "eager", "gradients: kernel", "eager")
    return (
        f"{grid(columns, lines)}\n\n{escape(measured_on['device'])}, {where}gptfast {measured_on['gptfast']}, PyTorch "
        f"{measured_on['torch']}, Triton {measured_on['triton']}; measured {content['datetime'][:10]} at commit "
        f"{content['commit_info']['id'][:10]}.\n"
    )


def _cells(rows: list[dict[str, Any]], kind: str) -> tuple[str, str]:
    """Errors of the row of this kind with the largest kernel error; dashes if there is none."""
    chosen = [row for row in rows if row["of"].startswith(kind)]
    if not chosen:
        return "-", "-"
    worst = max(chosen, key=lambda row: row["kernel"])
    return f"{worst['kernel']:.1e}", f"{worst['eager']:.1e}"


if __name__ == "__main__":
    run_command(main, "benchmarks.accuracy")
