import dataclasses
import json

import pytest
import torch

from benchmarks import accuracy
from benchmarks.measuring.processes import run_command
from benchmarks.operators import OPERATORS
from kernels import reference, runtime
from tests.support.oracle import DEVICE

NORM = OPERATORS["layer_norm"]
FP32 = torch.float32


def errors(case) -> dict[str, dict]:
    return {row["of"]: row for row in accuracy.errors(case, DEVICE)}


def norm_with(kernel):
    """The entry of layer norm with a function in the place of the kernel."""
    return dataclasses.replace(NORM, kernel=lambda case: kernel)


@pytest.mark.parametrize(
    ("name", "values", "rows"),
    [
        ("layer_norm", (4, 16), ["result", "gradient 0", "gradient 1", "gradient 2"]),
        ("add_layer_norm", (4, 16), ["result", "result 1", *(f"gradient {number}" for number in range(4))]),
        ("decode_attention", (1, 1, 16, 16), ["result"]),
    ],
)
def test_every_result_and_gradient_has_a_row(name, values, rows):
    found = errors(OPERATORS[name].case(*values, dtype=FP32))
    assert list(found) == rows
    for row in found.values():
        assert row["kernel"] < 1e-6
        assert row["eager"] < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_eager_in_the_place_of_the_kernel_has_the_same_error(dtype):
    for row in errors(norm_with(reference.layer_norm).case(4, 16, dtype=dtype)).values():
        assert 0 < row["kernel"] == row["eager"] < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("wrong", "which"),
    [
        (lambda x, w, b: reference.layer_norm(x, w, b) * 1.01, "result"),
        (lambda x, w, b: reference.layer_norm(x.detach(), w, b) + 0 * x, "gradient 0"),
        (lambda x, w, b: reference.layer_norm(x, w, b + (b - b.detach())), "gradient 2"),
    ],
)
def test_a_wrong_kernel_has_a_large_error(wrong, which):
    found = errors(norm_with(wrong).case(4, 16, dtype=FP32))
    assert found[which]["kernel"] > 5e-3
    assert found[which]["eager"] < 1e-6


@pytest.mark.parametrize("interpreted", [True, False])
def test_every_operator_is_measured(interpreted):
    names = {case.suite for case in accuracy.cases(FP32, interpreted)}
    assert names == set(OPERATORS) - {"ffn_up"}  # a part of an operator


def test_the_command_prints_the_worst_of_each_kind_and_the_report_reads_its_file(monkeypatch, tmp_path, capsys):
    results = pytest.importorskip("benchmarks.reporting.results")
    limits = {"copy_bytes_per_second": 1.0, "matrix_flops_per_second": {}}
    monkeypatch.setattr(accuracy, "cases", lambda dtype, interpreted: [NORM.case(4, 16, dtype=dtype)])
    monkeypatch.setattr(accuracy.machine, "measure_limits", lambda device: limits)
    accuracy.main(str(tmp_path))
    (path,) = tmp_path.glob("*/accuracy.json")
    content = json.loads(path.read_text())
    assert len(results.load(path).rows) == 0
    rows = [row for row in content["accuracy"] if row["dtype"] == "float16"]
    worst = max(row["kernel"] for row in rows if row["of"].startswith("gradient"))
    (line,) = [line for line in accuracy.passage(content).splitlines() if "| float16 |" in line]
    assert line.startswith("| `layer_norm` | N=4 C=16 | float16 | ")
    assert line.split(" | ")[-2] == f"{worst:.1e}"
    assert accuracy.passage(content) in capsys.readouterr().out
    assert ("in Triton's interpreter" in accuracy.passage(content)) is (DEVICE.type != "cuda")


def test_without_triton_the_command_ends_with_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runtime, "unsupported_reason", lambda device: "Triton is not installed")
    with pytest.raises(SystemExit) as ended:
        run_command(accuracy.main, "benchmarks.accuracy", ["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("benchmarks.accuracy: Triton is not installed; set TRITON_INTERPRET=1")
    assert not (tmp_path / "out").exists()
