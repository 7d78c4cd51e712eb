import sys

import pytest
import torch

from benchmarks.cost_model.training_step import Step
from benchmarks.measuring import operator_cases
from benchmarks.measuring.operator_providers import PROVIDERS
from benchmarks.roofline import __main__ as roofline
from gptfast import GPTConfig, hardware

H200 = next(gpu for gpu in hardware.GPUS if gpu.name == "H200 SXM")


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["roofline", *arguments])
    roofline.main()
    return capsys.readouterr().out


def test_a_memory_bound_operator_takes_the_time_of_its_bytes():
    rows = {
        (suite, case, mode): cost.seconds(peak, H200.bandwidth)
        for suite, case, mode, cost, peak in roofline.operator_costs(H200)
    }
    case = operator_cases.layer_norm(65_536, 1024, torch.bfloat16)
    read_and_written = 2 * 65_536 * 1024 * 2 + 2 * 1024 * 2
    assert rows["layer_norm", str(case), "forward"] == pytest.approx(read_and_written / 4.8e12)


def test_an_arithmetic_bound_operator_takes_the_time_of_its_flops():
    rows = {
        (suite, case, mode): cost.seconds(peak, H200.bandwidth)
        for suite, case, mode, cost, peak in roofline.operator_costs(H200)
    }
    case = operator_cases.gelu_ffn(32_768, 768, torch.bfloat16)
    assert rows["gelu_ffn", str(case), "backward"] == pytest.approx(8 * 32_768 * 768 * 3072 / 989.4e12, rel=1e-3)


def test_the_step_is_the_sum_of_its_operations():
    config = GPTConfig.preset("gpt2")
    seconds = roofline.step_seconds(config, 2, 1024, H200)
    step = Step(config, 2, 1024)
    assert set(seconds) == set(step.by_kind())
    assert seconds["optimizer"] == pytest.approx((28 + 8) * 124_439_808 / 4.8e12)  # AdamW, and clipping
    # a pass is as long as its slower half: no sum of a kind is below either
    for kind, cost in step.by_kind().items():
        assert seconds[kind] >= 0.999 * cost.seconds(989.4e12, 4.8e12)
    (attention,) = [one for one in step.block_forward() if one.kind == "attention"]
    assert attention.cost.seconds(989.4e12, 4.8e12) * 12 < seconds["attention"]


def test_every_gpu_of_the_table_is_predicted(monkeypatch, capsys):
    table = run(monkeypatch, capsys)
    assert all(f"\n{gpu.name} " in table for gpu in hardware.GPUS)


def test_one_gpu_with_all_operators_and_the_step(monkeypatch, capsys):
    printed = run(monkeypatch, capsys, "--gpu", "H200 SXM", "--batch", "4")
    assert all(f"\n{suite} " in printed for suite in PROVIDERS)
    assert "Training step of gpt2, 4 x 1024 tokens" in printed
    assert printed.splitlines()[-1].endswith("tokens/s")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "H2000"], "unknown GPU 'H2000'; accepted: "),
        (["--model", "gpt5"], "unknown model preset 'gpt5'"),
        (["--batch", "0"], "batch and length must be at least 1, got 0 and 1024"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"benchmarks.roofline: {said}")
