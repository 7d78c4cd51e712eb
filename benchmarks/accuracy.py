"""How far each operator's results are from the truth, and how far eager PyTorch's are: `python -m benchmarks.accuracy`.

The truth is the reference in float64. Results are written to FOLDER/<device>/accuracy.json, which `benchmarks.report`
accepts beside the others; it has no rows of theirs. Without a GPU the kernels run in Triton's interpreter
(TRITON_INTERPRET=1), at small sizes and without bfloat16, whose arithmetic the interpreter rounds as no GPU does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import tyro
from pytest_benchmark.utils import get_commit_info
from torch import Tensor

from benchmarks.measuring import machine, shapes
from benchmarks.measuring.comparison import Case, Operator, input_gradients, relative_error, results
from benchmarks.measuring.peers import PROVIDERS
from benchmarks.reporting.markdown import escape, grid
from benchmarks.reporting.results import FORMAT
from gptfast.files import write_json
from kernels import runtime

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
    reason = runtime.why_not(device)
    if reason is not None:
        print(f"benchmarks.accuracy: {reason}; TRITON_INTERPRET=1 has them interpreted", file=sys.stderr)
        sys.exit(2)
    content = measure(device)
    path = Path(options.out, machine.slug(device), "accuracy.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        print(f"benchmarks.accuracy: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{passage(content)}\n{path}")


def cases(dtype: torch.dtype, interpreted: bool) -> list[Case]:
    """GPT-2's shapes; for the interpreter, which computes one block after the other, smaller ones."""
    if interpreted:
        return [
            shapes.layer_norm(256, 768, dtype),
            shapes.add_layer_norm(256, 768, dtype),
            shapes.gelu_ffn(128, 256, dtype),
            shapes.causal_attention(1, 2, 256, 64, dtype),
            shapes.causal_attention_qkvpacked(1, 2, 256, 64, dtype),
            shapes.decode_attention(2, 2, 512, 64, dtype),
            shapes.int8_linear(4, 256, 512, dtype),
            shapes.linear_cross_entropy(128, 256, 1024, dtype),
        ]
    return [
        shapes.layer_norm(8192, 768, dtype),
        shapes.add_layer_norm(8192, 768, dtype),
        shapes.gelu_ffn(8192, 768, dtype),
        shapes.causal_attention(8, 12, 1024, 64, dtype),
        shapes.causal_attention_qkvpacked(8, 12, 1024, 64, dtype),
        shapes.decode_attention(8, 12, 1024, 64, dtype),
        shapes.int8_linear(16, 768, 50_304, dtype),
        shapes.linear_cross_entropy(8192, 768, 50_304, dtype),
    ]


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
        "gptfast_results": FORMAT,
        "datetime": datetime.now(UTC).isoformat(),
        "machine_info": {"gptfast": machine.describe(device) | {"limits": machine.measure_limits(device)}},
        "commit_info": get_commit_info(),
        "benchmarks": [],
        "not_measured": [],
        "interpreted": interpreted,
        "accuracy": rows,
    }


def errors(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """||y - truth|| / ||truth|| of the kernel and of eager PyTorch, for each result and gradient of a case.

    Upstream gradients are random normal. What no kernel computes, such as gradients of decoding, is left out.
    """
    provider = PROVIDERS[case.suite]["triton"]
    gradients = provider.modes != ("forward",)
    inputs = case.inputs(device)
    generator = torch.Generator(device).manual_seed(1)
    shapes_of_results = [y.shape for y in results(case.reference(*(tensor.to("meta") for tensor in inputs)))]
    upstream = [torch.randn(shape, generator=generator, device=device) for shape in shapes_of_results]
    truth, ours, theirs = (
        _run(operator, inputs, upstream, dtype, gradients)
        for operator, dtype in (
            (case.reference, torch.float64),
            (provider.build(case), case.dtype),
            (PROVIDERS[case.suite]["eager"].build(case), case.dtype),
        )
    )  # fmt: skip
    for name, expected in truth.items():
        yield {
            "operator": case.suite,
            "dims": dict(case.dims),
            "dtype": case.dtype_name,
            "of": name,
            "kernel": relative_error(ours[name], expected),
            "eager": relative_error(theirs[name], expected),
        }


def _run(
    operator: Operator, inputs: list[Tensor], upstream: list[Tensor], dtype: torch.dtype, gradients: bool
) -> dict[str, Tensor]:
    """Results and, if asked for, gradients of the inputs, by name and in order, computed in `dtype`."""
    own = [tensor.detach().to(dtype).requires_grad_(gradients) for tensor in inputs]
    y = operator(*own)
    found = {f"result {number}" if number else "result": one.detach() for number, one in enumerate(results(y))}
    if gradients:
        # rounded once, to what the kernel gets, whatever they are then computed in
        dy = [one.to(inputs[0].dtype).to(dtype) for one in upstream]
        found |= {f"gradient {number}": one for number, one in enumerate(input_gradients(y, own, dy))}
    return found


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
