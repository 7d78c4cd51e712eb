"""Errors against float64: small where all is well, large where it is not, and written so that a report reads on."""

import json

import pytest
import torch

from benchmarks import accuracy
from benchmarks.measuring import operator_bench, operator_cases, operator_providers
from benchmarks.reporting import results
from kernels import reference, runtime
from tests.support.oracle import DEVICE

CASE = operator_cases.layer_norm(4, 16, torch.float32)


def errors(case=CASE) -> dict[str, dict]:
    return {row["of"]: row for row in accuracy.errors(case, DEVICE)}


def test_results_and_gradients_each_have_errors():
    found = errors()
    assert list(found) == ["result", "gradient 0", "gradient 1", "gradient 2"]
    for row in found.values():
        assert 0 < row["kernel"] < 1e-6
        assert 0 < row["eager"] < 1e-6
    assert list(errors(operator_cases.add_layer_norm(4, 16, torch.float32)))[:2] == ["result", "result 1"]
    assert list(errors(operator_cases.decode_attention(1, 1, 16, 16, torch.float32))) == ["result"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_eager_beside_itself_is_as_far_from_the_truth(monkeypatch, dtype):
    eager = operator_bench.Provider("triton", lambda case: case.reference)
    monkeypatch.setitem(operator_providers.PROVIDERS["layer_norm"], "triton", eager)
    for row in errors(operator_cases.layer_norm(4, 16, dtype)).values():
        assert row["kernel"] == row["eager"] < torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("wrong", "which"),
    [
        (lambda x, w, b: reference.layer_norm(x, w, b) * 1.01, "result"),
        (lambda x, w, b: reference.layer_norm(x.detach(), w, b) + 0 * x, "gradient 0"),
        (lambda x, w, b: reference.layer_norm(x, w, b + (b - b.detach())), "gradient 2"),
    ],
)
def test_what_is_wrong_is_far_off(monkeypatch, wrong, which):
    monkeypatch.setitem(
        operator_providers.PROVIDERS["layer_norm"], "triton", operator_bench.Provider("triton", lambda case: wrong)
    )
    found = errors()
    assert found[which]["kernel"] > 5e-3
    assert found[which]["eager"] < 1e-6


def test_every_operator_with_a_suite_is_measured():
    operators = {case.suite for case in accuracy.cases(torch.float32, interpreted=True)}
    assert operators == {case.suite for case in accuracy.cases(torch.float32, interpreted=False)}
    assert operators == set(operator_providers.PROVIDERS) - {"ffn_up"}  # a part of an operator


def test_the_worst_of_each_kind_is_shown(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(accuracy, "cases", lambda dtype, interpreted: [operator_cases.layer_norm(4, 16, dtype)])
    monkeypatch.setattr(
        accuracy.machine, "measure_limits", lambda device: {"copy_bytes_per_second": 1.0, "matrix_flops_per_second": {}}
    )
    accuracy.main(["--out", str(tmp_path)])
    (path,) = tmp_path.glob("*/accuracy.json")
    content = json.loads(path.read_text())
    assert results.load_file(path).rows == ()
    rows = [row for row in content["accuracy"] if row["dtype"] == "float16"]
    worst = max(row["kernel"] for row in rows if row["of"].startswith("gradient"))
    (line,) = [line for line in accuracy.passage(content).splitlines() if "| float16 |" in line]
    assert line.startswith("| `layer_norm` | N=4 C=16 | float16 | ")
    assert line.split(" | ")[-2] == f"{worst:.1e}"
    assert accuracy.passage(content) in capsys.readouterr().out
    assert ("in Triton's interpreter" in accuracy.passage(content)) is (DEVICE.type != "cuda")


def test_where_kernels_cannot_run_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runtime, "unsupported_reason", lambda device: "Triton is not installed")
    with pytest.raises(SystemExit) as ended:
        accuracy.main(["--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("benchmarks.accuracy: Triton is not installed; TRITON_INTERPRET=1 ")
    assert not (tmp_path / "out").exists()
