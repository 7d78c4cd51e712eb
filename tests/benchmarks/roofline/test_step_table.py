import sys

import pytest

from benchmarks.cost_model.training_step import Step
from benchmarks.roofline import step_table
from gptfast import GPTConfig, hardware

H200 = next(gpu for gpu in hardware.GPUS if gpu.name == "H200 SXM")


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["step_table", *arguments])
    step_table.main()
    return capsys.readouterr().out


def test_every_pass_is_a_line(monkeypatch, capsys):
    printed = run(monkeypatch, capsys, "--batch", "4")
    step = Step(GPTConfig.preset("gpt2", pad_vocab_size_to=128), 4, 1024)
    for one in step.block_forward() + step.block_backward():
        assert f"| {one.name} |" in printed
    for one in step.around():
        assert f"| {one.kind}: {one.name} |" in printed
    total = sum(step.seconds(H200.flops["bfloat16"], H200.bandwidth).values())
    assert f"| all | {1e3 * total:.1f} ms | 100% |" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "H2000"], "unknown GPU 'H2000'; accepted: "),
        (["--model", "gpt5"], "unknown model preset 'gpt5'"),
        (["--batch", "0"], "batch and length must be at least 1, got 0 and 1024"),
        (
            ["--gpu", next(gpu.name for gpu in hardware.GPUS if "bfloat16" not in gpu.flops)],
            "no matrix peak in bfloat16",
        ),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"benchmarks.roofline.step_table: {said}")
