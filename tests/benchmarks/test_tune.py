import json

import pytest
import torch

import kernels
from benchmarks import tune
from benchmarks.measuring.processes import run_command
from kernels import runtime, tuning


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A simulated GPU, on which warming up measures one launch."""
    monkeypatch.setattr(runtime, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "made up")
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setenv("GPTFAST_CACHE", str(tmp_path / "cache"))
    calls = []

    def warmup(config, dtype, device, batch_size, autotune, int8):
        calls.append((config.n_embd, dtype, device, batch_size, autotune, int8))
        tuning._save(device, "matmul", (config.n_embd, dtype), {"BM": 16})
        tuning._on_measured("matmul", str(config.n_embd), [({"BM": 16}, 0.25), ({"BM": 512}, float("inf"))])

    monkeypatch.setattr(kernels, "warmup", warmup)
    return calls


def test_the_tables_are_in_the_form_of_the_package(gpu, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--models", "gpt2", "gpt2-xl", "--dtypes", "bfloat16"]
    run_command(tune.main, "benchmarks.tune", arguments)
    device = torch.device("cuda", 0)
    assert gpu[:2] == [(width, torch.bfloat16, device, 16, True, True) for width in (768, 1600)]
    table = json.loads((tmp_path / "out/sm_90.json").read_text())
    assert table["launches"] == {"matmul": {"768 bfloat16": {"BM": 16}, "1600 bfloat16": {"BM": 16}}}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "matmul, 768:"
    assert [line.split() for line in printed[1:3]] == [["*", "0.2500", "ms", "BM=16"], ["inf", "ms", "BM=512"]]
    assert printed[3].startswith("gpt2 bfloat16: ")
    lines = (tmp_path / "out/sm_90-times.jsonl").read_text().splitlines()
    assert [json.loads(line)["problem"] for line in lines[:3]] == ["768", "1600", "768"]
    assert json.loads(lines[0])["candidates"] == [
        {"options": {"BM": 16}, "milliseconds": 0.25},
        {"options": {"BM": 512}, "milliseconds": None},
    ]


def test_the_first_model_has_other_lengths_and_head_sizes():
    found = list(tune.shapes(("gpt2", "gpt2-xl"), 16))
    assert [name for name, _, _ in found[:2]] == ["gpt2", "gpt2-xl"]
    assert {(c.n_embd, c.n_embd // c.n_head, c.block_size, batch) for _, c, batch in found[2:]} == {
        (768, 64, 4096, 4), (768, 64, 16_384, 1), (768, 128, 1024, 16), (768, 128, 4096, 4), (768, 128, 16_384, 1),
    }  # fmt: skip
    assert len(list(tune.shapes(("gpt2-xl",), 16))) == 3  # heads of 128 do not divide its width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt3"], "model 'gpt3'; accepted: gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        (["--dtypes", "float64"], "dtype 'float64'; accepted: float32, float16, bfloat16"),
    ],
)
def test_an_unknown_model_or_dtype_is_rejected(gpu, arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(tune.main, "benchmarks.tune", ["--out", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert gpu == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_without_a_gpu_the_command_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command(tune.main, "benchmarks.tune", ["--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "benchmarks.tune: no CUDA GPU was found\n"
    assert not (tmp_path / "out").exists()
