"""Measure the kernels' launch configurations for GPT-2's sizes: `python -m benchmarks.tune --out DIR`.

Writes DIR/<architecture>.json, the form in which `kernels/launches/` holds what comes with the package, and
DIR/<architecture>-times.jsonl, a line with the times of all candidates for each measurement, which is printed too. What
is in this machine's cache folder already is not measured again, and what is measured is kept there; see
`kernels.tuning`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import tyro

import kernels
from gptfast import GPTConfig
from gptfast.config import PRESETS
from kernels import runtime

if TYPE_CHECKING:
    from kernels.tuning import Config  # which imports Triton


@dataclass
class Settings:
    """Measure the candidates of every kernel's launch on this machine's GPU."""

    out: str
    """Folder for the table."""
    models: tuple[str, ...] = tuple(PRESETS)
    """Presets whose widths are measured; the first one with other lengths and heads, too."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of the parameters."""
    batch_size: int = 16
    """Sequences of the preset's block size."""


# attention depends on these and not on the width; as many tokens in all
_HEAD_SIZES = (64, 128)
_LENGTHS = (1024, 4096, 16_384)


def main() -> None:
    """Tune; exit status 2 without a GPU or for a name that is not known."""
    options = tyro.cli(Settings)
    device = torch.device("cuda")
    reason = None if torch.cuda.is_available() else "no CUDA GPU was found"
    reason = reason or runtime.unsupported_reason(device) or _unknown("model", options.models, tuple(PRESETS))
    reason = reason or _unknown("dtype", options.dtypes, tuple(str(d).removeprefix("torch.") for d in runtime.DTYPES))
    if reason is not None:
        print(f"benchmarks.tune: {reason}", file=sys.stderr)
        sys.exit(2)
    from kernels import tuning

    device = torch.device("cuda", torch.cuda.current_device())
    told = Times(Path(options.out, f"{tuning.architecture(device)}-times.jsonl"))
    for name, config, batch_size in shapes(options.models, options.batch_size):
        for dtype in options.dtypes:
            start = time.monotonic()
            with tuning.on_measured(told):
                kernels.warmup(config, getattr(torch, dtype), device, batch_size, autotune=True, int8=True)
            print(f"{name} {dtype}: {time.monotonic() - start:.1f} s", flush=True)
            save(tuning.cache_file(device), Path(options.out, f"{tuning.architecture(device)}.json"))


def shapes(models: tuple[str, ...], batch_size: int) -> Iterator[tuple[str, GPTConfig, int]]:
    """Names, shapes and batch sizes to measure."""
    for model in models:
        yield model, GPTConfig.preset(model), batch_size
    for model in models[:1]:
        preset = GPTConfig.preset(model)
        for head_size in (size for size in _HEAD_SIZES if preset.n_embd % size == 0):
            for length in _LENGTHS:
                config = dataclasses.replace(preset, n_head=preset.n_embd // head_size, block_size=length)
                if config != preset:
                    name = f"{model} with heads of {head_size}, {length} tokens"
                    yield name, config, max(1, batch_size * preset.block_size // length)


class Times:
    """Prints what candidates take, and adds it to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, launch: str, problem: str, times: list[tuple[Config, float]]) -> None:
        fastest = min(milliseconds for _, milliseconds in times)
        print(f"{launch}, {problem}:")
        for options, milliseconds in times:
            mark = "*" if milliseconds == fastest else " "
            spelled = " ".join(f"{name}={value}" for name, value in options.items())
            print(f"  {mark} {milliseconds:9.4f} ms  {spelled}", flush=True)
        # JSON has no infinity
        candidates = [{"options": dict(o), "milliseconds": t if math.isfinite(t) else None} for o, t in times]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"launch": launch, "problem": problem, "candidates": candidates}) + "\n")


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
