"""Measure the kernels' launch configurations for GPT-2's sizes: `python -m benchmarks.tune --out DIR`.

Writes DIR/<architecture>.json, the form in which `kernels/launches/` holds what comes with the package. The same
measurements also serve this machine from its cache folder, see `kernels.tuning`.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import kernels
from gptfast import GPTConfig
from gptfast.config import PRESETS
from kernels import runtime


@dataclass
class Options:
    """Measure the candidates of every kernel's launch on this machine's GPU."""

    out: str
    """Folder for the table."""
    models: tuple[str, ...] = tuple(PRESETS)
    """Presets whose widths and head sizes are measured."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of the parameters."""
    batch_size: int = 16
    """Sequences of the preset's block size."""


def main() -> None:
    """Tune; exit status 2 without a GPU or for a name that is not known."""
    options = tyro.cli(Options)
    device = torch.device("cuda")
    reason = None if torch.cuda.is_available() else "no CUDA GPU was found"
    reason = reason or runtime.why_not(device) or _unknown("model", options.models, tuple(PRESETS))
    reason = reason or _unknown("dtype", options.dtypes, tuple(str(d).removeprefix("torch.") for d in runtime.DTYPES))
    if reason is not None:
        print(f"benchmarks.tune: {reason}", file=sys.stderr)
        sys.exit(2)
    from kernels import tuning

    device = torch.device("cuda", torch.cuda.current_device())
    for model in options.models:
        for dtype in options.dtypes:
            start = time.monotonic()
            config, parameters = GPTConfig.preset(model), getattr(torch, dtype)
            kernels.warmup(config, parameters, device, options.batch_size, autotune=True, int8=True)
            print(f"{model} {dtype}: {time.monotonic() - start:.1f} s", flush=True)
            save(tuning.cache_file(device), Path(options.out, f"{tuning.architecture(device)}.json"))


def save(measured: Path, table: Path) -> None:
    """Copy what was measured so far; nothing is there if no launch had a choice."""
    if measured.exists():
        table.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(measured, table)


def _unknown(kind: str, given: tuple[str, ...], accepted: tuple[str, ...]) -> str | None:
    wrong = [name for name in given if name not in accepted]
    return f"unknown {kind} {wrong[0]!r}; accepted: {', '.join(accepted)}" if wrong else None


if __name__ == "__main__":
    main()
