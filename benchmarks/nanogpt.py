"""The training step against nanoGPT's, interleaved in one process: `python -m benchmarks.nanogpt CHECKOUT`.

nanoGPT is not part of this package: CHECKOUT is a folder with its `model.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import tyro

import gptfast
from benchmarks.steps import TrainingStep, machine


@dataclass
class Options:
    """Measure the training step of gptfast and nanoGPT, alternating."""

    checkout: tyro.conf.Positional[str]
    """Folder with nanoGPT's model.py."""
    rounds: int = 200
    """Steps of each that are measured, after 20 that are not."""
    out: str | None = None
    """JSON file for the result."""


def load(checkout: str) -> ModuleType:
    """Import nanoGPT's model. Raises ValueError if the folder does not hold it."""
    path = Path(checkout, "model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{checkout} has no model.py; give a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compare(steps: dict[str, TrainingStep], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per step (median, p20, p80) and tokens per second at the median, of each in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(20 + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 20:
                times[name].append(time.perf_counter() - start)
    result = {}
    for name, measured in times.items():
        p20, *_, p80 = statistics.quantiles(measured, n=5)
        median = statistics.median(measured)
        result[name] = {
            "median_ms": 1e3 * median,
            "p20_ms": 1e3 * p20,
            "p80_ms": 1e3 * p80,
            "tokens_per_second": steps[name].tokens / median,
        }
    return result


def main() -> None:
    """Print the comparison, and write it where asked."""
    options = tyro.cli(Options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        nanogpt = load(options.checkout)
    except ValueError as error:
        sys.exit(f"benchmarks.nanogpt: {error}")
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
        theirs = TrainingStep(nanogpt, device, {})
    # nanoGPT's activation is GELU by erf
    result = compare(
        {"nanoGPT": theirs, "gptfast": TrainingStep(gptfast, device, {"activation": "gelu"})}, options.rounds
    )
    ratio = result["nanoGPT"]["median_ms"] / result["gptfast"]["median_ms"]
    hardware = machine(device)
    report = {"machine": hardware, "steps": result, "ratio": ratio, "backend": "auto"}
    for name, row in result.items():
        print(
            f"{name:8} {row['median_ms']:8.2f} ms (p20 {row['p20_ms']:.2f}, p80 {row['p80_ms']:.2f})"
            f"  {row['tokens_per_second']:10,.0f} tokens/s"
        )
    print(f"gptfast does {ratio:.3f} times nanoGPT's tokens/s on {hardware['device']}")
    if options.out is not None:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
