"""Where the time of an operator or a model goes, kernel by kernel: `python -m benchmarks.profiling SUITE`.

What is profiled is what the benchmarks time, checked against the reference first. The clock's time is taken without the
profiler; what the kernels do not fill of it, the GPU waits. On a CPU the rows are PyTorch's operators.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import tyro
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import model_providers, operator_cases
from benchmarks.measuring.machine import default_device
from benchmarks.measuring.model_bench import GenerationComparison, TrainingComparison
from benchmarks.measuring.model_providers import ModelCase
from benchmarks.measuring.operator_bench import Comparison, UnavailableError, WrongResultError
from benchmarks.measuring.operator_providers import PROVIDERS
from benchmarks.measuring.timing import WARMUP_CALLS, Call, synchronize
from gptfast import GPTConfig
from gptfast.config import PRESETS

MODELS = ("training", "generation")


@dataclass
class Options:
    """Profile an operator's pass, a training step or a continuation."""

    suite: tyro.conf.Positional[str]
    """training, generation, or the suite of an operator."""
    provider: str | None = None
    """As benchmarks name it; by default triton on a GPU and eager on a CPU."""
    case: str = ""
    """Words of an operator's case, such as "bfloat16 T=1024"; the first that has them all is taken."""
    mode: str = "forward"
    """An operator's pass: forward, backward or both."""
    model: str = "gpt2"
    """Preset of the model."""
    batch: int = 8
    """Sequences of the model."""
    length: int = 1024
    """Tokens of each, or of the prompts."""
    new_tokens: int = 64
    """Tokens to generate."""
    repeats: int = 5
    """Runs that the times are the mean of."""
    top: int = 20
    """Rows to print."""
    external: bool = False
    """Start no profiler, run once between cudaProfilerStart and Stop: for `ncu --profile-from-start off` and nsys."""


@dataclass(frozen=True)
class Row:
    """What a run spends in a kernel, or a CPU's operator: its launches and their seconds together."""

    name: str
    calls: float
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile and print; exit status 2 for what cannot be profiled, 1 for a wrong result."""
    options = tyro.cli(Options, prog="python -m benchmarks.profiling", args=arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of each start and stop
    device = default_device()
    try:
        print(report(options, device))
    except (UnavailableError, ValueError) as error:
        _exit(2, error)
    except WrongResultError as error:
        _exit(1, error)


def _exit(status: int, error: Exception) -> NoReturn:
    print(f"benchmarks.profiling: {error}", file=sys.stderr)
    sys.exit(status)


def report(options: Options, device: torch.device) -> str:
    """Profile, and tell of it.

    Raises:
        ValueError: an option that does not do.
        UnavailableError: the provider cannot run here.
        WrongResultError: its result is not the reference's.
    """
    comparison, name, mode = _comparison(options, device)
    call = comparison.call(name, mode)
    for _ in range(WARMUP_CALLS):  # graphs are captured at the third
        call.run(call.prepare())
    title = f"{options.suite}, {comparison.case}, {name}" + ("" if options.suite in MODELS else f", {mode}")
    if options.external:
        run_for_others(call, device)
        return f"{title}: ran once"
    seconds = clock(call, device, options.repeats)
    rows = kernels(call, device, options.repeats)
    return f"{title}\n{table(rows, seconds, device, options.top)}"


def _comparison(options: Options, device: torch.device) -> tuple[Any, str, str]:
    """The comparison with one provider, its name, and the pass."""
    if options.repeats < 1 or options.top < 1:
        raise ValueError(f"--repeats and --top must be at least 1, got {options.repeats} and {options.top}")
    if options.external and device.type != "cuda":
        raise ValueError("--external needs a CUDA GPU, and none was found")
    name = options.provider or ("triton" if device.type == "cuda" else "eager")
    if options.suite in MODELS:
        return _model_comparison(options, name, device), name, ""
    if options.suite not in operator_cases.SUITES:
        raise ValueError(f"unknown suite {options.suite!r}; accepted: {', '.join((*MODELS, *operator_cases.SUITES))}")
    providers = PROVIDERS[options.suite]
    _require_known("provider", name, providers)
    _require_known("mode", options.mode, providers[name].modes)
    cases = operator_cases.SUITES[options.suite]
    words = options.case.split()
    found = next((case for case in cases if all(word in str(case).split() for word in words)), None)
    if found is None:
        raise ValueError(f"no case has {options.case!r}; accepted: words of {'; '.join(map(str, cases))}")
    return Comparison(found, [providers[name]], device, {}), name, options.mode


def _model_comparison(options: Options, name: str, device: torch.device) -> TrainingComparison | GenerationComparison:
    providers = model_providers.providers(nanogpt=None)
    _require_known("provider", name, providers)
    _require_known("model", options.model, PRESETS)
    if min(options.batch, options.length, options.new_tokens) < 1:
        raise ValueError(
            f"--batch, --length and --new-tokens must be at least 1, got {options.batch}, {options.length} and "
            f"{options.new_tokens}"
        )
    training = options.suite == "training"
    new_tokens = 0 if training else options.new_tokens
    config = GPTConfig.preset(options.model, vocab_size=50304, block_size=max(options.length + new_tokens, 1024))
    case = ModelCase(options.suite, options.model, config, options.batch, options.length, new_tokens)
    return (TrainingComparison if training else GenerationComparison)(case, [providers[name]], device, {})


def _require_known(kind: str, name: str, accepted: Any) -> None:
    if name not in accepted:
        raise ValueError(f"unknown {kind} {name!r}; accepted: {', '.join(accepted)}")


def clock(call: Call, device: torch.device, repeats: int) -> float:
    """Mean seconds of a run, by the clock."""
    total = 0.0
    for _ in range(repeats):
        prepared = call.prepare()
        synchronize(device)
        start = time.perf_counter()
        call.run(prepared)
        synchronize(device)
        total += time.perf_counter() - start
    return total / repeats


def kernels(call: Call, device: torch.device, repeats: int) -> list[Row]:
    """What a run spends its time in, the longest first, without what `prepare` does."""
    on_gpu = device.type == "cuda"
    where = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found: dict[str, tuple[int, float]] = {}
    for _ in range(repeats):
        prepared = call.prepare()
        synchronize(device)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
            call.run(prepared)
            synchronize(device)
        for event in profiled.key_averages():
            # spans that someone named hold kernels that are counted themselves
            if event.device_type == where and not event.is_user_annotation:
                time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                calls, seconds = found.get(event.key, (0, 0.0))
                found[event.key] = calls + event.count, seconds + time_us / 1e6
    rows = [Row(name, calls / repeats, seconds / repeats) for name, (calls, seconds) in found.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def run_for_others(call: Call, device: torch.device) -> None:
    """Run once where a profiler that was started from outside looks."""
    prepared = call.prepare()
    synchronize(device)
    torch.cuda.profiler.start()
    call.run(prepared)
    synchronize(device)
    torch.cuda.profiler.stop()


def table(rows: list[Row], seconds: float, device: torch.device, top: int) -> str:
    """The rows, and what they leave of the clock's time."""
    busy, calls = sum(row.seconds for row in rows), sum(row.calls for row in rows)
    of = "kernels" if device.type == "cuda" else "operators"
    lines = [
        f"{1e3 * seconds:.3f} ms by the clock; {1e3 * busy:.3f} ms of {of} in {calls:,.0f} calls",
        "",
        f"{'us':>10} {'share':>6} {'calls':>7}  name",
    ]
    for row in rows[:top]:
        lines.append(f"{1e6 * row.seconds:10.1f} {row.seconds / busy:6.1%} {row.calls:7,.0f}  {row.name[:100]}")
    if len(rows) > top:
        rest = rows[top:]
        others = sum(row.seconds for row in rest), sum(row.calls for row in rest)
        lines.append(f"{1e6 * others[0]:10.1f} {others[0] / busy:6.1%} {others[1]:7,.0f}  {len(rest)} others")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
