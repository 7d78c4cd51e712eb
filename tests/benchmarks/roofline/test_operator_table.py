import sys

import pytest

from benchmarks.measuring.operator_providers import PROVIDERS
from benchmarks.roofline import operator_table
from gptfast import hardware

H200 = next(gpu for gpu in hardware.GPUS if gpu.name == "H200 SXM")


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["operator_table", *arguments])
    operator_table.main()
    return capsys.readouterr().out


def test_every_operator_with_a_suite_is_a_line(monkeypatch, capsys):
    printed = run(monkeypatch, capsys)
    for name in set(PROVIDERS) - {"ffn_up"}:  # a part of an operator
        assert printed.count(f"| `{name}` |") == 1


def test_the_least_time_is_that_of_the_slower_of_bytes_and_flops():
    rows, width = 131_072, 768
    moved = 2 * rows * width * 2 + 2 * width * 2  # x and y, weight and bias
    line = f"| forward | {7 * rows * width / 1e9:.1f} | {moved / 1e6:.0f} | {1e6 * moved / 4.8e12:.0f} us | memory |"
    assert f"| `layer_norm` | N=131,072 C=768 {line}" in operator_table.table(H200)
    flops = 4 * 32_768 * 768 * 3072
    (line,) = [line for line in operator_table.table(H200).splitlines() if line.startswith("| `gelu_ffn`")]
    assert f"{flops / 1e9:.1f} | " in line
    assert line.endswith(f"| {1e6 * flops / H200.flops['bfloat16']:.0f} us | arithmetic |")


def test_a_pass_that_does_two_things_is_one_line():
    """The loss's forward has done the backward's work."""
    lines = operator_table.table(H200).splitlines()
    (first,) = [number for number, line in enumerate(lines) if "`linear_cross_entropy`" in line]
    assert [line.split(" | ")[2] for line in lines[first:]] == ["forward", "forward and backward"]


@pytest.mark.parametrize(
    ("gpu", "said"),
    [
        ("H2000", "unknown GPU 'H2000'; accepted: "),
        (
            next(gpu.name for gpu in hardware.GPUS if "bfloat16" not in gpu.flops),
            "no matrix peak in bfloat16 is known of",
        ),
    ],
)
def test_bad_arguments(monkeypatch, capsys, gpu: str, said: str):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, "--gpu", gpu)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"benchmarks.roofline.operator_table: {said}")
