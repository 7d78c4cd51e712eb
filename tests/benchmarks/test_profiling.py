from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import profiling
from benchmarks.measuring import operator_cases
from benchmarks.measuring.operator_bench import Provider, WrongResultError
from benchmarks.measuring.operator_providers import PROVIDERS
from benchmarks.measuring.timing import Call
from benchmarks.profiling import Options, Row
from gptfast import GPTConfig
from gptfast.config import PRESETS
from kernels import reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Suites and presets of a size for tests, on a CPU."""
    monkeypatch.setattr(profiling, "default_device", lambda: CPU)
    cases = [operator_cases.layer_norm(rows, 48, torch.float32) for rows in (40, 80)]
    monkeypatch.setitem(operator_cases.SUITES, "layer_norm", cases)
    settings = {"n_layer": 1, "n_head": 2, "n_embd": 16}
    monkeypatch.setattr(GPTConfig, "preset", lambda name, **sizes: GPTConfig(**(sizes | settings | {"vocab_size": 64})))


def rows_of(printed: str) -> dict[str, int]:
    """Calls by name."""
    lines = printed.partition("name\n")[2].splitlines()
    return {line.split(maxsplit=3)[3]: int(line.split()[2].replace(",", "")) for line in lines}


def test_an_operators_pass(capsys):
    profiling.main(["layer_norm", "--case", "N=80 float32", "--mode", "backward", "--repeats", "2"])
    printed = capsys.readouterr().out
    assert printed.startswith("layer_norm, float32 N=80 C=48, eager, backward\n")
    assert rows_of(printed)["aten::native_layer_norm_backward"] == 1
    assert "aten::native_layer_norm" not in rows_of(printed)  # what comes before the pass is not its time


def test_the_first_case_is_taken_and_forward(capsys):
    profiling.main(["layer_norm", "--repeats", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("layer_norm, float32 N=40 C=48, eager, forward\n")
    assert rows_of(printed)["aten::native_layer_norm"] == 1


def test_a_training_step(capsys):
    profiling.main(["training", "--model", "gpt2", "--batch", "2", "--length", "8", "--repeats", "1", "--top", "200"])
    printed = capsys.readouterr().out
    assert printed.startswith("training, gpt2 B=2 T=8, eager\n")
    assert rows_of(printed)["aten::_fused_adamw_"] == 2  # parameters that decay, and others
    # spans with names, such as that of the optimizer's step, hold operators that are counted themselves
    assert not any("Optimizer.step" in name for name in rows_of(printed))


def test_a_continuation(capsys):
    arguments = ["--batch", "1", "--length", "4", "--new-tokens", "3", "--repeats", "1", "--top", "200"]
    profiling.main(["generation", *arguments])
    printed = capsys.readouterr().out
    assert printed.startswith("generation, gpt2 B=1 T=4 new=3, eager\n")
    assert rows_of(printed)["aten::argmax"] >= 3


def test_times_are_means_of_the_runs():
    x = torch.randn(200, 200)
    runs = []
    call = Call(lambda prepared: runs.append(x @ prepared), prepare=x.exp)
    rows = {row.name: row for row in profiling.kernels(call, CPU, 4)}
    assert rows["aten::mm"].calls == 1.0
    assert "aten::exp" not in rows
    assert 0.0 < rows["aten::mm"].seconds <= 4 * profiling.clock(call, CPU, 3)
    assert len(runs) == 7


def test_on_a_gpu_kernels_are_counted(monkeypatch):
    """What kineto tells there: the host's operators, kernels, and spans that hold kernels."""

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
    rows = profiling.kernels(Call(lambda _: None), torch.device("cuda"), 3)
    assert rows == [Row("large", 2.0, pytest.approx(30e-6)), Row("small", 2.0, pytest.approx(10e-6))]
    told = profiling.table(rows, 50e-6, torch.device("cuda"), top=1).splitlines()
    assert told[0] == "0.050 ms by the clock; 0.040 ms of kernels in 4 calls"
    assert told[3:] == ["      30.0  75.0%       2  large", "      10.0  25.0%       2  1 others"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["norm"], "unknown suite 'norm'; accepted: training, generation, "),
        (["layer_norm", "--provider", "none"], "unknown provider 'none'; accepted: triton, eager"),
        (["layer_norm", "--mode", "step"], "unknown mode 'step'; accepted: forward, backward, both"),
        (["layer_norm", "--case", "N=41"], "no case has 'N=41'; accepted: words of float32 N=40 C=48; float32 N=80"),
        (["layer_norm", "--repeats", "0"], "--repeats and --top must be at least 1, got 0 and 20"),
        (["training", "--model", "gpt3"], f"unknown model 'gpt3'; accepted: {', '.join(PRESETS)}"),
        (["training", "--batch", "0"], "--batch, --length and --new-tokens must be at least 1, got 0, 1024 and 64"),
        (["training", "--provider", "triton"], "Triton kernels are measured on a CUDA GPU, and none was found"),
        (["training", "--external"], "--external needs a CUDA GPU, and none was found"),
    ],
)
def test_what_cannot_be_profiled(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        profiling.main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"benchmarks.profiling: {said}")


def test_a_wrong_result_is_not_profiled(monkeypatch):
    wrong = Provider("eager", lambda case: lambda *arguments: 1.01 * reference.layer_norm(*arguments))
    monkeypatch.setitem(PROVIDERS["layer_norm"], "eager", wrong)
    with pytest.raises(WrongResultError):
        profiling.report(Options("layer_norm"), CPU)


def test_for_a_profiler_from_outside_it_runs_once_between_its_marks(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: seen.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: seen.append("stop"))
    call = Call(lambda _: seen.append("run"), prepare=lambda: seen.append("prepare"))
    profiling.run_for_others(call, CPU)
    assert seen == ["prepare", "start", "run", "stop"]
