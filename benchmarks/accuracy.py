"""How far each operator's results are from the truth, and how far eager PyTorch's are: `python -m benchmarks.accuracy`.

The truth is the reference in float64. Results are written to FOLDER/<device>/accuracy.json, which `benchmarks.report`
accepts beside the others; it has no rows of theirs. Without a GPU the kernels run in Triton's interpreter
(TRITON_INTERPRET=1), at small sizes and without bfloat16, whose arithmetic the interpreter rounds as no GPU does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks.measuring import machine, operator_cases, result_files
from benchmarks.measuring.operator_bench import Case, relative_error, run
from benchmarks.measuring.operator_providers import PROVIDERS
from benchmarks.reporting.markdown import escape, grid
from kernels import runtime

# each operator's sizes, and those for the interpreter
_CASES: tuple[tuple[Callable[..., Case], tuple[int, ...], tuple[int, ...]], ...] = (
    (operator_cases.layer_norm, (8192, 768), (256, 768)),
    (operator_cases.add_layer_norm, (8192, 768), (256, 768)),
    (operator_cases.gelu_ffn, (8192, 768), (128, 256)),
    (operator_cases.causal_attention, (8, 12, 1024, 64), (1, 2, 256, 64)),
    (operator_cases.causal_attention_qkvpacked, (8, 12, 1024, 64), (1, 2, 256, 64)),
    (operator_cases.decode_attention, (8, 12, 1024, 64), (2, 2, 512, 64)),
    (operator_cases.int8_linear, (16, 768, 50_304), (4, 256, 512)),
    (operator_cases.linear_cross_entropy, (8192, 768, 50_304), (128, 256, 1024)),
)
_NARROW, _FULL = (torch.float32, torch.float16), (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Options:
    """Measure the error of every operator's results and gradients, and that of eager PyTorch's, against float64."""

    out: str
    """Folder of results: OUT/<device>/accuracy.json is written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table; exit status 2 where the kernels cannot run, 1 where results cannot be written."""
    options = tyro.cli(Options, prog="python -m benchmarks.accuracy", args=arguments)
    device = machine.default_device()
    reason = runtime.unsupported_reason(device)
    if reason is not None:
        print(f"benchmarks.accuracy: {reason}; TRITON_INTERPRET=1 has them interpreted", file=sys.stderr)
        sys.exit(2)
    content = measure(device)
    path = Path(options.out, machine.slug(device), "accuracy.json")
    try:
        result_files.save(path, content)
    except OSError as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{passage(content)}\n{path}")


def cases(dtype: torch.dtype, interpreted: bool) -> list[Case]:
    """GPT-2's shapes; for the interpreter, which computes one block after the other, smaller ones."""
    return [make(*(small if interpreted else whole), dtype) for make, whole, small in _CASES]


def measure(device: torch.device) -> dict[str, Any]:
    """The results as they are written: machine, and a row for each result and gradient of each case."""
    interpreted = device.type != "cuda"
    rows = [
        row
        for dtype in (_NARROW if interpreted else _FULL)
        for case in cases(dtype, interpreted)
        for row in errors(case, device)
    ]
    return {
        **result_files.head(device),
        "interpreted": interpreted,
        "accuracy": rows,
    }


def errors(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """||y - truth|| / ||truth|| of the kernel and of eager PyTorch, for each result and gradient of a case.

    Upstream gradients are random normal. What no kernel computes, such as gradients of decoding, is left out.
    """
    provider = PROVIDERS[case.suite]["triton"]
    gradients = provider.differentiable
    inputs = case.inputs(device)
    dy = case.upstream(inputs)
    truth, ours, theirs = (
        run(operator, _leaves(inputs, dtype), [one.to(dtype) for one in dy], gradients)
        for operator, dtype in (
            (case.reference, torch.float64),
            (provider.build(case), case.dtype),
            (PROVIDERS[case.suite]["eager"].build(case), case.dtype),
        )
    )
    names = [*(f"result {number}" if number else "result" for number in range(len(dy)))]
    names += [f"gradient {number}" for number in range(len(truth) - len(dy))]
    for name, expected, kernel, eager in zip(names, truth, ours, theirs, strict=True):
        yield {
            "operator": case.suite,
            "dims": dict(case.dims),
            "dtype": case.dtype_name,
            "of": name,
            "kernel": relative_error(kernel, expected),
            "eager": relative_error(eager, expected),
        }


def _leaves(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def passage(content: dict[str, Any]) -> str:
    """What a document shows of the results: the worst result and gradient of each operator, and where they are from."""
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


def _cells(rows: list[dict[str, Any]], what: str) -> tuple[str, str]:
    """The row of this kind whose kernel is furthest from the truth; dashes where there is none."""
    chosen = [row for row in rows if row["of"].startswith(what)]
    if not chosen:
        return "-", "-"
    worst = max(chosen, key=lambda row: row["kernel"])
    return f"{worst['kernel']:.1e}", f"{worst['eager']:.1e}"


if __name__ == "__main__":
    main()
