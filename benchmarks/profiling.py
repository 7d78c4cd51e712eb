"""Time of an operator or a model by kernel: `python -m benchmarks.profiling SUITE`.

The profiled call is the one that the benchmarks time, checked against the reference first. The wall-clock time is
measured without the profiler; the GPU idles where its kernels do not fill it. On a CPU the rows are PyTorch operators.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from typing import Any, NamedTuple

import torch
import tyro
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import model_bench
from benchmarks.measuring.bench import Bench
from benchmarks.measuring.machine import default_device
from benchmarks.measuring.model_bench import BENCHES, ModelCase
from benchmarks.measuring.operator_bench import OperatorBench
from benchmarks.measuring.processes import require_known, require_positive, run_command
from benchmarks.measuring.timing import WARMUP_CALLS, Call, WallClock, synchronize
from benchmarks.operators import OPERATORS
from gptfast import GPTConfig
from gptfast.config import PRESETS


class KernelTime(NamedTuple):
    """Launches and seconds of a kernel, or of a CPU operator, per run."""

    name: str
    calls: float
    seconds: float


def main(
    suite: tyro.conf.Positional[str],
    provider: str | None = None,
    case: str = "",
    mode: str = "forward",
    model: str = "gpt2",
    batch: int = 8,
    length: int = 1024,
    new_tokens: int = 64,
    repeats: int = 5,
    top: int = 20,
    external: bool = False,
) -> None:
    """Profile an operator's pass, a training step or a continuation.

    Args:
        suite: training, generation, or the name of an operator.
        provider: its name in the benchmarks; by default triton on a GPU, and on a CPU eager or, for models, cpu.
        case: words of an operator's case, such as "bfloat16 T=1024"; the first case with all of them is taken.
        mode: an operator's pass: forward, backward or both.
        model: preset of the model.
        batch: sequences of the model.
        length: tokens of each sequence, or of each prompt.
        new_tokens: tokens to generate.
        repeats: runs that are averaged.
        top: rows to print.
        external: run once between cudaProfilerStart and Stop, for `ncu --profile-from-start off` and nsys.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences a line at each start and stop
    device = default_device()
    require_positive(batch=batch, length=length, new_tokens=new_tokens, repeats=repeats, top=top)
    if external and device.type != "cuda":
        raise ValueError("--external needs a CUDA GPU, and none was found")
    require_known("suite", suite, [*BENCHES, *OPERATORS])
    provider = provider or ("triton" if device.type == "cuda" else "cpu" if suite in BENCHES else "eager")
    if suite in BENCHES:
        mode = model_bench.MODES[suite]
        bench = build_model_bench(suite, model, batch, length, new_tokens, provider, device)
    else:
        bench = build_operator_bench(suite, case, mode, provider, device)
    call = bench.call(provider, mode)
    for _ in range(WARMUP_CALLS):  # CUDA graphs are captured at the third call
        call.run(call.prepare())
    title = f"{suite}, {bench.case}, {provider}" + ("" if suite in BENCHES else f", {mode}")
    if external:
        run_once(call, device)
        print(f"{title}: ran once")
    else:
        clock = WallClock(device)
        seconds = statistics.fmean(clock(call)[0] for _ in range(repeats))
        print(f"{title}\n{table(profile_kernels(call, device, repeats), seconds, device, top)}")


def build_operator_bench(suite: str, words: str, mode: str, provider: str, device: torch.device) -> Bench:
    """Build the bench of the first case with all the words."""
    operator = OPERATORS[suite]
    require_known("provider", provider, operator.providers)
    require_known("mode", mode, operator.providers[provider].modes)
    found = next((case for case in operator.cases if set(words.split()) <= set(str(case).split())), None)
    if found is None:
        raise ValueError(f"unknown case {words!r}; accepted: words of {'; '.join(map(str, operator.cases))}")
    return OperatorBench(found, [operator.providers[provider]], device, {})


def build_model_bench(
    suite: str, model: str, batch: int, length: int, new_tokens: int, provider: str, device: torch.device
) -> Bench:
    """Build the bench of a preset."""
    providers = model_bench.providers(nanogpt=None)
    require_known("provider", provider, providers)
    require_known("model", model, PRESETS)
    new_tokens = new_tokens if suite == "generation" else 0
    config = GPTConfig.preset(model, vocab_size=50304, block_size=max(length + new_tokens, 1024))
    case = ModelCase(suite, model, config, batch, length, (provider,), new_tokens)
    return BENCHES[suite](case, [providers[provider]], device, {})


def profile_kernels(call: Call, device: torch.device, repeats: int) -> list[KernelTime]:
    """Profile runs without their `prepare`, and return the kernels by time, the longest first."""
    on_gpu = device.type == "cuda"
    activity, kind = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    calls: Counter[str] = Counter()
    microseconds: Any = Counter()  # floats
    for _ in range(repeats):
        prepared = call.prepare()
        synchronize(device)
        with profile(activities=[activity]) as profiled:
            call.run(prepared)
            synchronize(device)
        for event in profiled.key_averages():
            # user annotations are spans around kernels that are counted themselves
            if event.device_type == kind and not event.is_user_annotation:
                calls[event.key] += event.count
                microseconds[event.key] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return [KernelTime(name, calls[name] / repeats, us / repeats / 1e6) for name, us in microseconds.most_common()]


def run_once(call: Call, device: torch.device) -> None:
    """Run once between the markers of an external profiler."""
    prepared = call.prepare()
    synchronize(device)
    torch.cuda.profiler.start()
    call.run(prepared)
    synchronize(device)
    torch.cuda.profiler.stop()


def table(rows: list[KernelTime], seconds: float, device: torch.device, top: int) -> str:
    """Format the longest rows and the sum of the others, below the wall-clock time."""
    total, others = _sum("all", rows), _sum(f"{len(rows) - top} others", rows[top:])
    kind = "kernels" if device.type == "cuda" else "operators"
    lines = [
        f"{1e3 * seconds:.3f} ms wall clock; {1e3 * total.seconds:.3f} ms of {kind} in {total.calls:,.0f} calls",
        "",
        f"{'us':>10} {'share':>6} {'calls':>7}  name",
    ]
    for name, calls, each in [*rows[:top], *([others] if rows[top:] else [])]:
        lines.append(f"{1e6 * each:10.1f} {each / total.seconds:6.1%} {calls:7,.0f}  {name[:100]}")
    return "\n".join(lines)


def _sum(name: str, rows: list[KernelTime]) -> KernelTime:
    return KernelTime(name, sum(row.calls for row in rows), sum(row.seconds for row in rows))


if __name__ == "__main__":
    run_command(main, "benchmarks.profiling")
