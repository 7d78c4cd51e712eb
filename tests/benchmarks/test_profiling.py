import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import profiling
from benchmarks.measuring.operator_bench import Provider, Sizes
from benchmarks.measuring.processes import run_command
from benchmarks.measuring.timing import Call, WallClock
from benchmarks.operators import OPERATORS
from benchmarks.profiling import KernelTime
from gptfast import GPTConfig
from gptfast.config import PRESETS
from kernels import reference

CPU = torch.device("cpu")
WRONG = Provider("wrong", lambda case: lambda *tensors: 1.01 * reference.layer_norm(*tensors))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Operators and presets of a size for tests, on a CPU."""
    monkeypatch.setattr(profiling, "default_device", lambda: CPU)
    sizes = tuple(Sizes((rows, 48), torch.float32) for rows in (40, 80))
    changed = dataclasses.replace(OPERATORS["layer_norm"], sizes=sizes, peers=(WRONG,))
    monkeypatch.setitem(OPERATORS, "layer_norm", changed)
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    monkeypatch.setattr(GPTConfig, "preset", lambda name, **sizes: GPTConfig(**(sizes | settings | {"vocab_size": 64})))


def run(*arguments: str) -> None:
    run_command(profiling.main, "benchmarks.profiling", [*arguments, "--top", "200"])


def calls_by_name(printed: str) -> dict[str, int]:
    lines = printed.partition("name\n")[2].splitlines()
    return {line.split(maxsplit=3)[3]: int(line.split()[2].replace(",", "")) for line in lines}


@pytest.mark.parametrize(
    ("arguments", "title", "counted", "absent"),
    [
        (  # without the forward
            ["--case", "N=80 float32", "--mode", "backward"],
            *("float32 N=80 C=48, eager, backward", "native_layer_norm_backward", "native_layer_norm"),
        ),
        ([], "float32 N=40 C=48, eager, forward", "native_layer_norm", "native_layer_norm_backward"),
    ],
)
def test_profiling_an_operators_pass(arguments, title, counted, absent, capsys):
    run("layer_norm", *arguments, "--repeats", "2")
    printed = capsys.readouterr().out
    assert printed.startswith(f"layer_norm, {title}\n")
    calls = calls_by_name(printed)
    assert calls[f"aten::{counted}"] == 1
    assert f"aten::{absent}" not in calls


def test_profiling_a_training_step(capsys):
    run("training", "--provider", "eager", "--batch", "2", "--length", "8", "--repeats", "1")
    printed = capsys.readouterr().out
    assert printed.startswith("training, gpt2 B=2 T=8, eager\n")
    calls = calls_by_name(printed)
    assert calls["aten::_fused_adamw_"] == 2  # parameters with and without weight decay
    # the span of the optimizer's step holds operators that are counted themselves
    assert not any("Optimizer.step" in name for name in calls)


def test_profiling_generation(capsys):
    run("generation", "--provider", "eager", "--batch", "1", "--length", "4", "--new-tokens", "3", "--repeats", "1")
    printed = capsys.readouterr().out
    assert printed.startswith("generation, gpt2 B=1 T=4 new=3, eager\n")
    assert calls_by_name(printed)["aten::argmax"] >= 3


def test_times_are_means_of_the_runs():
    x = torch.randn(200, 200)
    runs = []
    call = Call(lambda prepared: runs.append(x @ prepared), prepare=x.exp)
    rows = {row.name: row for row in profiling.profile_kernels(call, CPU, 4)}
    assert rows["aten::mm"].calls == 1.0
    assert "aten::exp" not in rows
    assert 0.0 < rows["aten::mm"].seconds <= 4 * max(WallClock(CPU)(call)[0] for _ in range(3))


def test_on_a_gpu_only_kernels_are_counted(monkeypatch):
    def event(key: str, where: DeviceType, microseconds: float, span: bool = False) -> SimpleNamespace:
        times = {"self_device_time_total": microseconds, "self_cpu_time_total": 7.0}
        return SimpleNamespace(key=key, device_type=where, count=2, is_user_annotation=span, **times)

    class Profile:
        def __init__(self, activities) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def key_averages(self):
            return [
                event("aten::mm", DeviceType.CPU, 0.0),
                event("small", DeviceType.CUDA, 10.0),
                event("large", DeviceType.CUDA, 30.0),
                event("Optimizer.step#AdamW.step", DeviceType.CUDA, 40.0, span=True),
            ]

    monkeypatch.setattr(profiling, "profile", Profile)
    monkeypatch.setattr(profiling, "synchronize", lambda device: None)
    rows = profiling.profile_kernels(Call(lambda _: None), torch.device("cuda"), 3)
    assert rows == [KernelTime("large", 2.0, pytest.approx(30e-6)), KernelTime("small", 2.0, pytest.approx(10e-6))]
    lines = profiling.table(rows, 50e-6, torch.device("cuda"), top=1).splitlines()
    assert lines[0] == "0.050 ms wall clock; 0.040 ms of kernels in 4 calls"
    assert lines[3:] == ["      30.0  75.0%       2  large", "      10.0  25.0%       2  1 others"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["norm"], "suite 'norm'; accepted: training, generation, "),
        (["layer_norm", "--provider", "none"], "provider 'none'; accepted: triton, eager"),
        (["layer_norm", "--mode", "step"], "mode 'step'; accepted: forward, backward, both"),
        (["layer_norm", "--case", "N=41"], "case 'N=41'; accepted: words of float32 N=40 C=48; float32 N=80"),
        (["layer_norm", "--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["training", "--model", "gpt3"], f"model 'gpt3'; accepted: {', '.join(PRESETS)}"),
        (["training", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["training", "--provider", "triton"], "CUDA GPU"),
        (["training", "--external"], "--external needs a CUDA GPU"),
    ],
)
def test_bad_arguments_are_rejected_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.profiling: ")
    assert message in line


def test_a_wrong_result_is_not_profiled(capsys):
    with pytest.raises(SystemExit) as ended:
        run("layer_norm", "--provider", "wrong")
    assert ended.value.code == 1
    assert "the result is wrong" in capsys.readouterr().err


def test_an_external_profiler_sees_one_run_between_its_markers(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    call = Call(lambda _: seen.append("run"), prepare=lambda: seen.append("prepare"))
    profiling.run_once(call, CPU)
    assert seen == ["prepare", "start", "run", "stop"]
