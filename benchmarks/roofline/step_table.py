"""Passes of a training step and their lower bounds, as in docs/step.md: `python -m benchmarks.roofline.step_table`."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.cost_model.training_step import Pass, StepCost
from benchmarks.measuring.processes import require_positive, run_command
from benchmarks.reporting.markdown import grid
from benchmarks.roofline import gpu_named, matrix_peak
from gptfast import GPTConfig
from gptfast.hardware import GPU


def main(gpu: str = "H200 SXM", model: str = "gpt2", batch: int = 32, length: int = 1024) -> None:
    """Print what a training step reads, writes and keeps, and its least time.

    Args:
        gpu: name of a GPU in the table of `gptfast.hardware`.
        model: preset whose shape is counted, with its vocabulary padded to a multiple of 128.
        batch: sequences.
        length: tokens of each sequence.
    """
    require_positive(batch=batch, length=length)
    config = GPTConfig.preset(model, pad_vocab_size_to=128, block_size=max(length, 1024))
    print(tables(config, batch, length, gpu_named(gpu)), end="")


def tables(config: GPTConfig, batch: int, length: int, gpu: GPU) -> str:
    """Return all tables in Markdown.

    Raises:
        ValueError: the GPU's matrix peak in bfloat16 is unknown.
    """
    peak = matrix_peak(gpu)
    step = StepCost(config, batch, length)
    narrow = StepCost(config, batch, length, residual_itemsize=2)
    once = sorted(step.around(), key=lambda one: -one.cost.bytes)

    def least_time(one: Pass) -> str:
        """The bound of a pass and its cause, such as "157 us, arithmetic"."""
        return f"{1e6 * one.cost.seconds(peak, gpu.bandwidth):,.0f} us, {one.cost.bound(peak, gpu.bandwidth)}"

    def passes_table(passes: list[Pass]) -> str:
        lines = [
            (one.name, tensors(one.reads), tensors(one.writes), ", ".join(one.keeps), least_time(one)) for one in passes
        ]
        return grid(("pass", "reads", "writes", "keeps", "least time"), lines)

    parts = [
        "Forward of one block, in MB:",
        passes_table(step.block_forward()),
        f"It keeps {step.kept_bytes() / 1e6:,.0f} MB for its backward, {narrow.kept_bytes() / 1e6:,.0f} MB with the "
        "residual stream in bfloat16; with activation checkpointing its inputs alone, "
        f"{step.block_input_bytes() / 1e6:,.0f} MB.",
        "Backward of one block, in MB:",
        passes_table(step.block_backward()),
        "Once a step, in MB:",
        grid(
            ("pass", "moves", "least time"),
            [(f"{one.kind}: {one.name}", megabytes(one.cost.bytes), least_time(one)) for one in once],
        ),
        f"The whole step on {gpu.name} ({peak / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.1f} TB/s):",
        totals_table(batch * length, *(one.seconds(peak, gpu.bandwidth) for one in (step, narrow))),
    ]
    return "\n\n".join(parts) + "\n"


def totals_table(tokens: int, wide: dict[str, float], narrow: dict[str, float]) -> str:
    """Least time by kind of operation, with the residual stream in float32 and in bfloat16."""
    wide_total, narrow_total = sum(wide.values()), sum(narrow.values())
    lines = [
        (kind, f"{1e3 * value:.2f} ms", f"{value / wide_total:.0%}", f"{1e3 * narrow[kind]:.2f} ms")
        for kind, value in sorted(wide.items(), key=lambda item: -item[1])
    ]
    lines.append(("all", f"{1e3 * wide_total:.1f} ms", "100%", f"{1e3 * narrow_total:.1f} ms"))
    lines.append(("tokens/s", f"{tokens / wide_total:,.0f}", "", f"{tokens / narrow_total:,.0f}"))
    return grid(("kind", "stream in float32", "share", "stream in bfloat16"), lines)


def tensors(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items())


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f}" if size >= 1e6 else "<1"


if __name__ == "__main__":
    run_command(main, "benchmarks.roofline.step_table")
