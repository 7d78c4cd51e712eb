"""`pytest benchmarks --benchmark-only` as people call it, on a few cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about what a machine without a GPU says")


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def load(folder: Path) -> dict:
    (path,) = folder.glob("*/few.json")
    return json.loads(path.read_text())


@needs_no_cuda
def test_models_are_measured_and_the_file_says_on_what(tmp_path):
    few = "(training and nano-B1-T64) or (generation and nano-B1-T32)"
    done = benchmark("-k", few, "--results", str(tmp_path), "--results-name", "few")
    assert done.returncode == 0, done.stdout
    results = load(tmp_path)
    assert results["gptfast_results"] == 1
    machine = results["machine_info"]["gptfast"]
    assert machine["torch"] == torch.__version__
    assert machine["kind"] == machine["slug"] == "cpu"
    assert machine["limits"]["copy_bytes_per_second"] > 1e8
    assert machine["limits"]["matrix_flops_per_second"]["float32"] > 1e9
    assert "node" not in results["machine_info"]
    assert {"id", "dirty"} <= set(results["commit_info"])
    rows = {(row["extra_info"]["suite"], row["extra_info"]["provider"]): row for row in results["benchmarks"]}
    assert {("training", "eager"), ("training", "Hugging Face"), ("generation", "eager")} <= set(rows)
    for row in rows.values():
        # pytest-benchmark's own statistics are of the very times that were measured
        assert row["stats"]["median"] == pytest.approx(row["extra_info"]["seconds"]["median"])
        assert row["extra_info"]["error"] < 1e-4
    training = rows["training", "eager"]["extra_info"]
    assert training["tokens_per_second"] == pytest.approx(64 / training["seconds"]["median"])
    assert training["flops_per_token_thop"] == training["flops_per_token"]
    assert 0 < training["mfu_causal"] < training["mfu"] < 2
    written = rows["generation", "eager"]["extra_info"]
    assert written["seconds_to_first_token"] < written["seconds"]["median"]
    assert 0 < written["mbu"] < 2
    reasons = {(row["suite"], row["mode"], row["provider"]): row["reason"] for row in results["not_measured"]}
    assert "CUDA GPU" in reasons["generation", "generate", "triton"]
    assert "--nanogpt" in reasons["generation", "generate", "nanoGPT"]


@needs_no_cuda
def test_all_that_needs_a_gpu_is_one_line():
    done = benchmark("-k", "layer_norm or gelu_ffn or causal_attention")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("operators are measured on a CUDA GPU, and none was found") == 1


@needs_no_cuda
def test_a_spent_budget_starts_nothing():
    done = benchmark("-k", "training", "--time-budget", "0")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("the time budget of 0 s is spent") == 1
    assert " passed" not in done.stdout


def test_a_checkout_that_is_none(tmp_path):
    case = "training and nano-B12-T64 and nanoGPT"
    done = benchmark("-k", case, "--nanogpt", str(tmp_path))
    assert f"--nanogpt {tmp_path} has no model.py" in done.stdout


def test_a_peak_that_is_no_number_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setenv("GPTFAST_PEAK_FLOPS", "fast")
    done = benchmark("-k", "training")
    assert done.returncode == 4
    assert "GPTFAST_PEAK_FLOPS" in done.stderr
    assert "'fast'" in done.stderr
