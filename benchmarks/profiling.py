"""Time of an operator or a model by kernel: `python -m benchmarks.profiling SUITE`.

The profiled call is the one that the benchmarks time, checked against the reference first. The wall-clock time is
measured without the profiler; the GPU idles where its kernels do not fill it. On a CPU the rows are PyTorch operators.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import model_providers
from benchmarks.measuring.bench import Bench
from benchmarks.measuring.machine import default_device
from benchmarks.measuring.model_bench import GenerationBench, TrainingBench
from benchmarks.measuring.model_providers import ModelCase
from benchmarks.measuring.operator_bench import OperatorBench
from benchmarks.measuring.processes import run_command
from benchmarks.measuring.timing import WARMUP_CALLS, Call, WallClock, synchronize
from benchmarks.operators import OPERATORS
from gptfast import GPTConfig
from gptfast.config import PRESETS

MODELS = {"training": TrainingBench, "generation": GenerationBench}


@dataclass(frozen=True)
class KernelTime:
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
    if repeats < 1 or top < 1:
        raise ValueError(f"--repeats and --top must be at least 1, got {repeats} and {top}")
    if external and device.type != "cuda":
        raise ValueError("--external needs a CUDA GPU, and none was found")
    provider = provider or ("triton" if device.type == "cuda" else "cpu" if suite in MODELS else "eager")
    if suite in MODELS:
        bench = model_bench(suite, model, batch, length, new_tokens, provider, device)
        mode = model_providers.MODES[suite]
    else:
        bench = operator_bench(suite, case, mode, provider, device)
    call = bench.call(provider, mode)
    for _ in range(WARMUP_CALLS):  # CUDA graphs are captured at the third call
        call.run(call.prepare())
    title = f"{suite}, {bench.case}, {provider}" + ("" if suite in MODELS else f", {mode}")
    if external:
        run_between_markers(call, device)
        print(f"{title}: ran once")
    else:
        clock = WallClock(device)
        seconds = statistics.fmean(clock(call)[0] for _ in range(repeats))
        print(f"{title}\n{table(profile_kernels(call, device, repeats), seconds, device, top)}")


def operator_bench(suite: str, words: str, mode: str, provider: str, device: torch.device) -> Bench:
    """Build the bench of the first case with all the words. Raises ValueError for unknown names."""
    _require_known("suite", suite, {**MODELS, **OPERATORS})
    operator = OPERATORS[suite]
    _require_known("provider", provider, operator.providers)
    _require_known("mode", mode, operator.providers[provider].modes)
    found = next((case for case in operator.cases if set(words.split()) <= set(str(case).split())), None)
    if found is None:
        raise ValueError(f"unknown case {words!r}; accepted: words of {'; '.join(map(str, operator.cases))}")
    return OperatorBench(found, [operator.providers[provider]], device, {})


def model_bench(
    suite: str, model: str, batch: int, length: int, new_tokens: int, provider: str, device: torch.device
) -> Bench:
    """Build the bench of a model with a padded vocabulary. Raises ValueError for unknown names and bad sizes."""
    providers = model_providers.providers(nanogpt=None)
    _require_known("provider", provider, providers)
    _require_known("model", model, PRESETS)
    if min(batch, length, new_tokens) < 1:
        raise ValueError(
            f"--batch, --length and --new-tokens must be at least 1, got {batch}, {length} and {new_tokens}"
        )
    new_tokens = new_tokens if suite == "generation" else 0
    config = GPTConfig.preset(model, vocab_size=50304, block_size=max(length + new_tokens, 1024))
    case = ModelCase(suite, model, config, batch, length, (provider,), new_tokens)
    return MODELS[suite](case, [providers[provider]], device, {})


def _require_known(kind: str, name: str, accepted: Any) -> None:
    if name not in accepted:
        raise ValueError(f"unknown {kind} {name!r}; accepted: {', '.join(accepted)}")


def profile_kernels(call: Call, device: torch.device, repeats: int) -> list[KernelTime]:
    """Profile runs without their `prepare`, and return the kernels by time, the longest first."""
    on_gpu = device.type == "cuda"
    activity, kind = (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    found: dict[str, tuple[int, float]] = {}
    for _ in range(repeats):
        prepared = call.prepare()
        synchronize(device)
        with profile(activities=[activity]) as profiled:
            call.run(prepared)
            synchronize(device)
        for event in profiled.key_averages():
            # user annotations are spans around kernels that are counted themselves
            if event.device_type == kind and not event.is_user_annotation:
                microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                calls, seconds = found.get(event.key, (0, 0.0))
                found[event.key] = calls + event.count, seconds + microseconds / 1e6
    rows = [KernelTime(name, calls / repeats, seconds / repeats) for name, (calls, seconds) in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def run_between_markers(call: Call, device: torch.device) -> None:
    """Run once between the markers of an external profiler."""
    prepared = call.prepare()
    synchronize(device)
    torch.cuda.profiler.start()
    call.run(prepared)
    synchronize(device)
    torch.cuda.profiler.stop()


def table(rows: list[KernelTime], seconds: float, device: torch.device, top: int) -> str:
    """Format the longest rows and the sum of the others, below the wall-clock time."""
    busy, calls = sum(row.seconds for row in rows), sum(row.calls for row in rows)
    kind = "kernels" if device.type == "cuda" else "operators"
    shown, rest = rows[:top], rows[top:]
    if rest:
        others = KernelTime(f"{len(rest)} others", sum(row.calls for row in rest), sum(row.seconds for row in rest))
        shown = [*shown, others]
    return "\n".join(
        [
            f"{1e3 * seconds:.3f} ms wall clock; {1e3 * busy:.3f} ms of {kind} in {calls:,.0f} calls",
            "",
            f"{'us':>10} {'share':>6} {'calls':>7}  name",
            *(
                f"{1e6 * row.seconds:10.1f} {row.seconds / busy:6.1%} {row.calls:7,.0f}  {row.name[:100]}"
                for row in shown
            ),
        ]
    )


if __name__ == "__main__":
    run_command(main, "benchmarks.profiling")
