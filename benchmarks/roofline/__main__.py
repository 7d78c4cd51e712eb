"""Least time of every operator and of a training step by the data sheet: `python -m benchmarks.roofline`.

An operation takes at least the time of its bytes at the memory bandwidth, and of its FLOPs at the matrix peak. Machines
reach 80 to 90% of either.
"""

from __future__ import annotations

from benchmarks.cost_model.training_step import StepCost
from benchmarks.measuring.bench import dtype_name
from benchmarks.measuring.processes import require_positive, run_command
from benchmarks.operators import OPERATORS
from benchmarks.roofline import gpu_named
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
    require_positive(batch=batch, length=length)
    chosen = None if gpu is None else gpu_named(gpu)
    step = StepCost(GPTConfig.preset(model, vocab_size=50304, block_size=max(length, 1024)), batch, length)
    title = f"Training step of {model}, {batch} x {length} tokens"
    if chosen is not None:
        print_operators(chosen)
        print(f"\n{title}")
        print_step(step, chosen)
        return
    print(f"{title}, at the roofline\n{'GPU':16} {'ms':>9} {'tokens/s':>11}  bound by")
    for each in hardware.GPUS:
        if seconds := step_seconds(step, each):
            total = sum(seconds.values())
            speed, longest = batch * length / total, max(seconds, key=seconds.__getitem__)
            print(f"{each.name:16} {1e3 * total:9.1f} {speed:11,.0f}  {longest}")
        else:
            print(f"{each.name:16} {'':9} {'':11}  no known matrix peak in 16 bits")


def step_seconds(step: StepCost, gpu: GPU) -> dict[str, float]:
    """Compute the least seconds of a training step by kind of operation.

    Products are in bf16, or in fp16 on a chip without bf16. Empty if neither peak is known.
    """
    peak = gpu.flops.get("bfloat16") or gpu.flops.get("float16")
    return step.seconds(peak, gpu.bandwidth) if peak else {}


def print_operators(gpu: GPU) -> None:
    print(f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s; {gpu.source}")
    print(f"{'operator':26} {'case':33} {'mode':9} {'us':>10} {'TFLOP/s':>8} {'GB/s':>6}  bound by")
    for name, operator in OPERATORS.items():
        for case in operator.cases:
            peak = gpu.flops.get(dtype_name(case.dtype))
            if peak is None:
                continue
            for mode in operator.modes:
                cost = case.cost(mode)
                seconds = cost.seconds(peak, gpu.bandwidth)
                print(
                    f"{name:26} {case!s:33} {mode:9} {1e6 * seconds:10.1f} {cost.flops / seconds / 1e12:8.1f} "
                    f"{cost.bytes / seconds / 1e9:6.0f}  {cost.bound(peak, gpu.bandwidth)}"
                )


def print_step(step: StepCost, gpu: GPU) -> None:
    seconds = step_seconds(step, gpu)
    if not seconds:
        print("no known matrix peak in 16 bits")
        return
    total = sum(seconds.values())
    for kind, part in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{kind:22} {1e3 * part:8.2f} ms {part / total:6.1%}")
    print(f"{'all':22} {1e3 * total:8.2f} ms        {step.batch * step.length / total:,.0f} tokens/s")


if __name__ == "__main__":
    run_command(main, "benchmarks.roofline")
