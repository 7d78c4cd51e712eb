"""Least time of every operator and of a training step by the data sheet: `python -m benchmarks.roofline`.

An operation takes at least the time of its bytes at the memory bandwidth, and of its FLOPs at the matrix peak. Machines
reach 80 to 90% of either.
"""

from __future__ import annotations

from benchmarks.measuring.processes import run_command
from benchmarks.operators import OPERATORS
from benchmarks.roofline.bounds import gpu_named, matrix_peak, require_batch, step_seconds
from gptfast import GPTConfig, hardware
from gptfast.hardware import GPU


def main(gpu: str | None = None, model: str = "gpt2", batch: int = 32, length: int = 1024) -> None:
    """Predict the least time of every operator and of a training step.

    Args:
        gpu: name of a GPU in the table; by default the step on all of them, without the operators.
        model: preset of the training step.
        batch: sequences of the training step.
        length: tokens of each sequence.
    """
    require_batch(batch, length)
    chosen = None if gpu is None else gpu_named(gpu)
    config = GPTConfig.preset(model, vocab_size=50304, block_size=max(length, 1024))
    title = f"Training step of {model}, {batch} x {length} tokens"
    if chosen is None:
        print(f"{title}, at the roofline")
        print(f"{'GPU':16} {'ms':>9} {'tokens/s':>11}  bound by")
        for each in hardware.GPUS:
            print_step_in_a_line(step_seconds(config, batch, length, each), each, batch * length)
    else:
        print_operators(chosen)
        print(f"\n{title}")
        print_step(step_seconds(config, batch, length, chosen), batch * length)


def print_step_in_a_line(seconds: dict[str, float] | None, gpu: GPU, tokens: int) -> None:
    if seconds is None:
        print(f"{gpu.name:16} {'':9} {'':11}  no known matrix peak in 16 bits")
        return
    total = sum(seconds.values())
    print(f"{gpu.name:16} {1e3 * total:9.1f} {tokens / total:11,.0f}  {max(seconds, key=seconds.__getitem__)}")


def print_operators(gpu: GPU) -> None:
    print(f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s; {gpu.source}")
    print(f"{'operator':26} {'case':33} {'mode':9} {'us':>10} {'TFLOP/s':>8} {'GB/s':>6}  bound by")
    for name, operator in OPERATORS.items():
        for case in operator.cases:
            peak = matrix_peak(gpu, case.dtype)
            if peak is None:
                continue
            for mode in operator.modes:
                cost = case.cost(mode)
                seconds = cost.seconds(peak, gpu.bandwidth)
                print(
                    f"{name:26} {case!s:33} {mode:9} {1e6 * seconds:10.1f} {cost.flops / seconds / 1e12:8.1f} "
                    f"{cost.bytes / seconds / 1e9:6.0f}  {cost.bound(peak, gpu.bandwidth)}"
                )


def print_step(seconds: dict[str, float] | None, tokens: int) -> None:
    if seconds is None:
        print("no known matrix peak in 16 bits")
        return
    total = sum(seconds.values())
    for kind, part in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{kind:22} {1e3 * part:8.2f} ms {part / total:6.1%}")
    print(f"{'all':22} {1e3 * total:8.2f} ms        {tokens / total:,.0f} tokens/s")


if __name__ == "__main__":
    run_command(main, "benchmarks.roofline")
