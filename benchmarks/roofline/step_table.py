"""Passes of a training step and their lower bounds on time: `python -m benchmarks.roofline.step_table`.

What docs/step.md holds between its markers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import tyro

from benchmarks.cost_model.training_step import Pass, Step
from benchmarks.reporting.markdown import grid
from benchmarks.roofline.__main__ import gpu_named, matrix_peak, require_batch
from gptfast import GPTConfig
from gptfast.hardware import GPU

START, END = "<!-- tables:start -->", "<!-- tables:end -->"


@dataclass
class Options:
    """Print what a training step reads, writes and keeps, and how long that takes at least."""

    gpu: str = "H200 SXM"
    """Name of a GPU in the table of `gptfast.hardware`."""
    model: str = "gpt2"
    """Preset whose shape is counted, its vocabulary padded to a multiple of 128."""
    batch: int = 32
    """Sequences."""
    length: int = 1024
    """Tokens of each."""


def main() -> None:
    """Print the tables; exit status 2 for an unknown GPU or model."""
    options = tyro.cli(Options)
    try:
        gpu = gpu_named(options.gpu)
        require_batch(options.batch, options.length)
        config = GPTConfig.preset(options.model, pad_vocab_size_to=128, block_size=max(options.length, 1024))
        print(tables(config, options.batch, options.length, gpu), end="")
    except ValueError as error:
        print(f"benchmarks.roofline.step_table: {error}", file=sys.stderr)
        sys.exit(2)


def tables(config: GPTConfig, batch: int, length: int, gpu: GPU) -> str:
    """All tables in Markdown.

    Raises:
        ValueError: a GPU whose matrix peak in bfloat16 is not known.
    """
    peak = matrix_peak(gpu, torch.bfloat16)
    if peak is None:
        raise ValueError(f"no matrix peak in bfloat16 is known of {gpu.name}")
    step = Step(config, batch, length)
    narrow = Step(config, batch, length, residual_itemsize=2)
    once = sorted(step.around(), key=lambda one: -one.cost.bytes)
    parts = [
        "Forward of one block, in MB:",
        passes_table(step.block_forward(), gpu, peak),
        f"It keeps {step.kept_bytes() / 1e6:,.0f} MB for its backward, {narrow.kept_bytes() / 1e6:,.0f} MB with the "
        "residual stream in bfloat16; with activation checkpointing its inputs alone, "
        f"{step.block_input_bytes() / 1e6:,.0f} MB.",
        "Backward of one block, in MB:",
        passes_table(step.block_backward(), gpu, peak),
        "Once a step, in MB:",
        grid(
            ("pass", "moves", "least time"),
            [(f"{one.kind}: {one.name}", amount(one.cost.bytes), microseconds(one, gpu, peak)) for one in once],
        ),
        f"The whole step on {gpu.name} ({peak / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.1f} TB/s):",
        totals_table(step, narrow, gpu, peak),
    ]
    return "\n\n".join(parts) + "\n"


def passes_table(passes: list[Pass], gpu: GPU, peak: float) -> str:
    return grid(
        ("pass", "reads", "writes", "keeps", "least time"),
        [
            (one.name, tensors(one.reads), tensors(one.writes), ", ".join(one.keeps), microseconds(one, gpu, peak))
            for one in passes
        ],
    )


def totals_table(step: Step, narrow: Step, gpu: GPU, peak: float) -> str:
    """Least time by kind, with the residual stream in float32 and in bfloat16; passes follow one another."""
    wide, half = (one.seconds(peak, gpu.bandwidth) for one in (step, narrow))
    lines = [
        (kind, f"{1e3 * value:.2f} ms", f"{value / sum(wide.values()):.0%}", f"{1e3 * half[kind]:.2f} ms")
        for kind, value in sorted(wide.items(), key=lambda item: -item[1])
    ]
    lines.append(("all", f"{1e3 * sum(wide.values()):.1f} ms", "100%", f"{1e3 * sum(half.values()):.1f} ms"))
    speeds = (step.batch * step.length / sum(one.values()) for one in (wide, half))
    first, second = (f"{speed:,.0f}" for speed in speeds)
    lines.append(("tokens/s", first, "", second))
    return grid(("kind", "stream in float32", "share", "stream in bfloat16"), lines)


def microseconds(one: Pass, gpu: GPU, peak: float) -> str:
    """Such as "157 us, arithmetic": the least time of a pass and what bounds it."""
    return f"{1e6 * one.cost.seconds(peak, gpu.bandwidth):,.0f} us, {one.cost.bound(peak, gpu.bandwidth)}"


def tensors(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {amount(size)}" for name, size in sizes.items())


def amount(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e6 else "<1"


if __name__ == "__main__":
    main()
