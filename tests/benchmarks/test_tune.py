import json
import sys

import pytest
import torch

import kernels
from benchmarks import tune
from kernels import runtime, tuning


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is made up, on which warming up measures one launch."""
    monkeypatch.setattr(runtime, "why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    calls = []

    def warmup(config, dtype, device, batch_size, autotune, int8):
        calls.append((config.n_embd, dtype, device, batch_size, autotune, int8))
        tuning._keep(device, "matmul", (config.n_embd, dtype), {"BM": 16})

    monkeypatch.setattr(kernels, "warmup", warmup)
    return calls


def test_a_table_is_written_in_the_form_that_the_package_reads(gpu, tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--models", "gpt2", "gpt2-xl", "--dtypes", "bfloat16"]
    monkeypatch.setattr(sys, "argv", ["tune", *arguments])
    tune.main()
    device = torch.device("cuda", 0)
    assert gpu == [(width, torch.bfloat16, device, 16, True, True) for width in (768, 1600)]
    table = json.loads((tmp_path / "out/sm_90.json").read_text())
    assert table["launches"] == {"matmul": {"768 bfloat16": {"BM": 16}, "1600 bfloat16": {"BM": 16}}}
    assert capsys.readouterr().out.startswith("gpt2 bfloat16: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt3"], "unknown model 'gpt3'; accepted: gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        (["--dtypes", "float64"], "unknown dtype 'float64'; accepted: float32, float16, bfloat16"),
    ],
)
def test_what_is_not_known_is_refused(gpu, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"benchmarks.tune: {message}\n"
    assert gpu == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "benchmarks.tune: no CUDA GPU was found\n"
    assert not (tmp_path / "out").exists()
