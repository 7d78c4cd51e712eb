"""What the data sheets allow: the least time of every operator and of a training step on the GPUs of the table.

`python -m benchmarks.roofline --gpu "H200 SXM"`. Each operation takes at least the time of its bytes at the memory's
bandwidth and of its FLOPs at the matrix peak, whichever is longer (Williams et al. 2009, "Roofline"). Measured times
are held against these; machines reach some 80 to 90% of either.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import tyro

from benchmarks.cost_model.operators import Cost
from benchmarks.cost_model.training_step import Step
from benchmarks.measuring import operator_cases
from benchmarks.measuring.operator_providers import PROVIDERS
from gptfast import GPTConfig, hardware
from gptfast.hardware import GPU


@dataclass
class Options:
    """Predict the least time of every operator and of a training step."""

    gpu: str | None = None
    """Name of a GPU in the table; all of them if not given, without the operators."""
    model: str = "gpt2"
    """Preset of the training step."""
    batch: int = 32
    """Sequences of the training step."""
    length: int = 1024
    """Tokens of each."""


def matrix_peak(gpu: GPU, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s for products of `dtype`; None where the chip has none or the data sheet is silent."""
    return gpu.flops.get(str(dtype).removeprefix("torch."))


def step_seconds(config: GPTConfig, batch: int, length: int, gpu: GPU) -> dict[str, float] | None:
    """Least seconds of a training step in bf16 by kind of operation, or in fp16 where the chip has no bf16.

    None where it has neither. Operations follow one another: the sum is the step's.
    """
    peak = matrix_peak(gpu, torch.bfloat16) or matrix_peak(gpu, torch.float16)
    if peak is None:
        return None
    return Step(config, batch, length).seconds(peak, gpu.bandwidth)


def operator_costs(gpu: GPU) -> list[tuple[str, str, str, Cost, float]]:
    """Suite, case, mode, cost and matrix peak of every case of the operators' suites that `gpu` can compute."""
    rows = []
    for suite, cases in operator_cases.SUITES.items():
        for case in cases:
            peak = matrix_peak(gpu, case.dtype)
            if peak is None:
                continue
            for mode in PROVIDERS[suite]["triton"].modes:
                cost = case.cost(mode)
                rows.append((suite, str(case), mode, cost, peak))
    return rows


def gpu_named(name: str) -> GPU:
    """The GPU of the table with this name. Raises ValueError where there is none."""
    known = {gpu.name: gpu for gpu in hardware.GPUS}
    if name not in known:
        raise ValueError(f"unknown GPU {name!r}; accepted: {', '.join(known)}")
    return known[name]


def require_batch(batch: int, length: int) -> None:
    """Raise ValueError unless there are sequences, and tokens in them."""
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")


def main() -> None:
    """Print the predictions; exit status 2 for an unknown GPU or model."""
    options = tyro.cli(Options)
    try:
        gpu = None if options.gpu is None else gpu_named(options.gpu)
        config = GPTConfig.preset(options.model, vocab_size=50304, block_size=max(options.length, 1024))
        require_batch(options.batch, options.length)
    except ValueError as error:
        print(f"benchmarks.roofline: {error}", file=sys.stderr)
        sys.exit(2)
    if gpu is None:
        print_gpus(config, options)
    else:
        print_operators(gpu)
        print_step(config, options, gpu)


def print_gpus(config: GPTConfig, options: Options) -> None:
    print(f"Training step of {options.model}, {options.batch} x {options.length} tokens, at the roofline")
    print(f"{'GPU':16} {'ms':>9} {'tokens/s':>11}  bound by")
    for gpu in hardware.GPUS:
        seconds = step_seconds(config, options.batch, options.length, gpu)
        if seconds is None:
            print(f"{gpu.name:16} {'':9} {'':11}  no matrix peak in 16 bits is known")
            continue
        total = sum(seconds.values())
        tokens = options.batch * options.length / total
        print(f"{gpu.name:16} {1e3 * total:9.1f} {tokens:11,.0f}  {max(seconds, key=seconds.__getitem__)}")


def print_operators(gpu: GPU) -> None:
    print(f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s; {gpu.source}")
    print(f"{'operator':17} {'case':33} {'mode':9} {'us':>10} {'TFLOP/s':>8} {'GB/s':>6}  bound by")
    for suite, case, mode, cost, peak in operator_costs(gpu):
        seconds = cost.seconds(peak, gpu.bandwidth)
        print(
            f"{suite:17} {case:33} {mode:9} {1e6 * seconds:10.1f} {cost.flops / seconds / 1e12:8.1f} "
            f"{cost.bytes / seconds / 1e9:6.0f}  {cost.bound(peak, gpu.bandwidth)}"
        )


def print_step(config: GPTConfig, options: Options, gpu: GPU) -> None:
    seconds = step_seconds(config, options.batch, options.length, gpu)
    print(f"\nTraining step of {options.model}, {options.batch} x {options.length} tokens")
    if seconds is None:
        print("no matrix peak in 16 bits is known")
        return
    total = sum(seconds.values())
    for kind, part in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{kind:22} {1e3 * part:8.2f} ms {part / total:6.1%}")
    print(f"{'all':22} {1e3 * total:8.2f} ms        {options.batch * options.length / total:,.0f} tokens/s")


if __name__ == "__main__":
    main()
