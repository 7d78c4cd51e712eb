"""Measure the kernels' launch configurations for GPT-2's sizes: `python -m benchmarks.tune --out DIR`.

Writes DIR/<architecture>.json, in the form of the tables in `kernels/launches/`, and DIR/<architecture>-times.jsonl, a
line with the times of all candidates for each measurement. Launches that this machine's cache folder holds already are
not measured again; see `kernels.tuning`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kernels
from benchmarks.measuring.bench import dtype_name
from benchmarks.measuring.processes import require_known, run_command
from gptfast import GPTConfig
from gptfast.config import PRESETS
from kernels import runtime

# attention depends on these and not on the width; the batch size keeps the number of tokens
HEAD_SIZES = (64, 128)
LENGTHS = (1024, 4096, 16_384)


def main(
    out: str,
    models: tuple[str, ...] = tuple(PRESETS),
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    batch_size: int = 16,
) -> None:
    """Measure the candidates of every kernel's launch on this machine's GPU.

    Args:
        out: folder for the tables.
        models: presets whose widths are measured; the first one also with other lengths and head sizes.
        dtypes: of the parameters.
        batch_size: sequences of the preset's block size.
    """
    reason = runtime.unsupported_reason(torch.device("cuda")) if torch.cuda.is_available() else "no CUDA GPU was found"
    if reason is not None:
        raise ValueError(reason)
    for model in models:
        require_known("model", model, PRESETS)
    for dtype in dtypes:
        require_known("dtype", dtype, map(dtype_name, runtime.DTYPES))
    from kernels import tuning  # imports Triton

    device = torch.device("cuda", torch.cuda.current_device())
    architecture = tuning.architecture(device)
    on_measured = partial(record, Path(out, f"{architecture}-times.jsonl"))
    for name, config, sequences in shapes(models, batch_size):
        for dtype in dtypes:
            start = time.monotonic()
            with tuning.on_measured(on_measured):
                kernels.warmup(config, getattr(torch, dtype), device, sequences, autotune=True, int8=True)
            print(f"{name} {dtype}: {time.monotonic() - start:.1f} s", flush=True)
            measured = tuning.cache_file(device)
            if measured.exists():  # absent if no launch has a choice
                Path(out).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(measured, Path(out, f"{architecture}.json"))


def shapes(models: tuple[str, ...], batch_size: int) -> Iterator[tuple[str, GPTConfig, int]]:
    """Names, shapes and batch sizes to measure."""
    for model in models:
        yield model, GPTConfig.preset(model), batch_size
    for model, head_size, length in itertools.product(models[:1], HEAD_SIZES, LENGTHS):
        preset = GPTConfig.preset(model)
        if preset.n_embd % head_size == 0:
            config = dataclasses.replace(preset, n_head=preset.n_embd // head_size, block_size=length)
            if config != preset:
                name = f"{model} with heads of {head_size}, {length} tokens"
                yield name, config, max(1, batch_size * preset.block_size // length)


def record(path: Path, launch: str, problem: str, times: list[tuple[Mapping[str, Any], float]]) -> None:
    """Print the times of a launch's candidates and append them to a file."""
    fastest = min(milliseconds for _, milliseconds in times)
    print(f"{launch}, {problem}:")
    for options, milliseconds in times:
        mark = "*" if milliseconds == fastest else " "
        spelled = " ".join(f"{name}={value}" for name, value in options.items())
        print(f"  {mark} {milliseconds:9.4f} ms  {spelled}", flush=True)
    # JSON has no infinity
    candidates = [{"options": dict(o), "milliseconds": t if math.isfinite(t) else None} for o, t in times]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"launch": launch, "problem": problem, "candidates": candidates}) + "\n")


if __name__ == "__main__":
    run_command(main, "benchmarks.tune")
