import re

import pytest

from benchmarks.cost_model.training_step import StepCost
from benchmarks.measuring.processes import run_command
from benchmarks.operators import OPERATORS
from benchmarks.roofline import gpu_named, operator_table, step_table
from benchmarks.roofline.__main__ import main, step_seconds
from gptfast import GPTConfig, hardware

H200 = gpu_named("H200 SXM")
NO_BF16 = next(gpu.name for gpu in hardware.GPUS if "bfloat16" not in gpu.flops)


@pytest.mark.parametrize(
    ("case", "mode", "seconds", "bound"),
    [
        ("layer_norm bfloat16 N=65536 C=1024", "forward", (2 * 65_536 + 2) * 1024 * 2 / 4.8e12, "memory"),
        ("gelu_ffn bfloat16 N=32768 C=768 F=3072", "backward", 8 * 32_768 * 768 * 3072 / 989.4e12, "arithmetic"),
    ],
)
def test_an_operator_takes_the_time_of_its_bytes_or_flops(case, mode, seconds, bound, capsys):
    main(gpu="H200 SXM")
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    (line,) = [line for line in lines if line.startswith(f"{case} {mode} ")]
    assert line.startswith(f"{case} {mode} {1e6 * seconds:.1f} ")
    assert line.endswith(f" {bound}")


def test_a_step_is_the_sum_of_its_operations():
    step = StepCost(GPTConfig.preset("gpt2"), 2, 1024)
    seconds = step_seconds(step, H200)
    assert set(seconds) == set(step.by_kind())
    assert seconds["optimizer"] == pytest.approx((28 + 8) * 124_439_808 / 4.8e12)  # AdamW and clipping
    # a pass is as long as its slower half, so a kind is no shorter than either sum
    for kind, cost in step.by_kind().items():
        assert seconds[kind] >= 0.999 * cost.seconds(989.4e12, 4.8e12)
    (attention,) = [one for one in step.block_forward() if one.kind == "attention"]
    assert attention.cost.seconds(989.4e12, 4.8e12) * 12 < seconds["attention"]


def test_every_gpu_of_the_table_is_predicted(capsys):
    main()
    printed = capsys.readouterr().out
    assert all(f"\n{gpu.name} " in printed for gpu in hardware.GPUS)


def test_one_gpu_has_all_operators_and_the_step(capsys):
    main(gpu="H200 SXM", batch=4)
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in OPERATORS)
    assert "Training step of gpt2, 4 x 1024 tokens" in printed
    assert printed.splitlines()[-1].endswith("tokens/s")


def test_the_operator_table_has_every_operator():
    printed = operator_table.table(H200)
    for name in set(OPERATORS) - {"ffn_up"}:  # a part of an operator
        assert printed.count(f"| `{name}` |") == 1


def test_the_operator_table_has_the_slower_of_bytes_and_flops():
    rows, width = 131_072, 768
    moved = 2 * rows * width * 2 + 2 * width * 2  # x and y, weight and bias
    line = f"| forward | {7 * rows * width / 1e9:.1f} | {moved / 1e6:.0f} | {1e6 * moved / 4.8e12:.0f} us | memory |"
    assert f"| `layer_norm` | N=131,072 C=768 {line}" in operator_table.table(H200)
    flops = 4 * 32_768 * 768 * 3072
    (line,) = [line for line in operator_table.table(H200).splitlines() if line.startswith("| `gelu_ffn`")]
    assert f"{flops / 1e9:.1f} | " in line
    assert line.endswith(f"| {1e6 * flops / H200.flops['bfloat16']:.0f} us | arithmetic |")


def test_the_operator_table_joins_the_passes_of_the_loss():
    lines = operator_table.table(H200).splitlines()
    (first,) = [number for number, line in enumerate(lines) if "`linear_cross_entropy`" in line]
    assert [line.split(" | ")[2] for line in lines[first : first + 2]] == ["forward", "forward and backward"]
    assert not lines[first + 2].startswith("|  |")


def test_the_step_table_has_every_pass(capsys):
    step_table.main(batch=4)
    printed = capsys.readouterr().out
    step = StepCost(GPTConfig.preset("gpt2", pad_vocab_size_to=128), 4, 1024)
    for one in step.block_forward() + step.block_backward():
        assert f"| {one.name} |" in printed
    for one in step.around():
        assert f"| {one.kind}: {one.name} |" in printed
    total = sum(step.seconds(H200.flops["bfloat16"], H200.bandwidth).values())
    assert f"| all | {1e3 * total:.1f} ms | 100% |" in printed


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (main, ["--gpu", "H2000"], "GPU 'H2000'; accepted: V100"),
        (main, ["--model", "gpt5"], "'gpt5'"),
        (main, ["--batch", "0"], "--batch .* got 0"),
        (operator_table.main, ["--gpu", "H2000"], "GPU 'H2000'"),
        (operator_table.main, ["--gpu", NO_BF16], f"{NO_BF16} .* bfloat16"),
        (step_table.main, ["--gpu", "H2000"], "GPU 'H2000'"),
        (step_table.main, ["--gpu", NO_BF16], f"{NO_BF16} .* bfloat16"),
        (step_table.main, ["--model", "gpt5"], "'gpt5'"),
        (step_table.main, ["--batch", "0"], "--batch .* got 0"),
    ],
)
def test_bad_arguments_are_rejected_in_one_line(capsys, command, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run_command(command, "benchmarks.roofline", arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"benchmarks.roofline: .*{message}", line)
