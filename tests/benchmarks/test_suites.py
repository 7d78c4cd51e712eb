"""Runs of `pytest benchmarks --benchmark-only` on a few cases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@needs_no_cuda
def test_models_are_measured_and_written_with_the_machine(tmp_path):
    few = "(training and nano-B1-T64) or (generation and nano-B1-T32)"
    done = benchmark("-k", few, "--results", str(tmp_path), "--results-name", "few")
    assert done.returncode == 0, done.stdout
    results = json.loads((tmp_path / "cpu/few.json").read_text())
    assert results["gptfast_results"] == 1
    machine = results["machine_info"]["gptfast"]
    assert machine["torch"] == torch.__version__
    assert machine["kind"] == machine["slug"] == "cpu"
    assert machine["limits"]["copy_bytes_per_second"] > 1e8
    assert machine["limits"]["matrix_flops_per_second"]["float32"] > 1e9
    assert "node" not in results["machine_info"]
    assert {"id", "dirty"} <= set(results["commit_info"])
    rows = {(row["extra_info"]["suite"], row["extra_info"]["provider"]): row for row in results["benchmarks"]}
    providers = {"cpu", "eager", "Hugging Face"}
    assert set(rows) >= {(suite, provider) for suite in ("training", "generation") for provider in providers}
    for row in rows.values():  # pytest-benchmark's statistics describe the measured times
        assert row["stats"]["median"] == pytest.approx(row["extra_info"]["seconds"]["median"])
        assert row["extra_info"]["error"] < 1e-4
    training = rows["training", "cpu"]["extra_info"]
    assert training["tokens_per_second"] == pytest.approx(64 / training["seconds"]["median"])
    assert training["flops_per_token_thop"] == training["flops_per_token"]
    assert 0 < training["mfu_causal"] < training["mfu"] < 2
    generation = rows["generation", "cpu"]["extra_info"]
    assert generation["seconds_to_first_token"] < generation["seconds"]["median"]
    assert 0 < generation["mbu"] < 2
    reasons = {(row["suite"], row["mode"], row["provider"]): row["reason"] for row in results["not_measured"]}
    assert "CUDA GPU" in reasons["generation", "generate", "triton"]
    assert "--nanogpt" in reasons["generation", "generate", "nanoGPT"]


@needs_no_cuda
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-k", "layer_norm or gelu_ffn or causal_attention"], "operators are measured on a CUDA GPU"),
        (["-k", "training", "--time-budget", "0"], "the time budget of 0 s is spent"),
    ],
)
def test_skipped_measurements_have_one_line_with_the_reason(arguments, reason):
    done = benchmark(*arguments)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(reason) == 1
    assert " passed" not in done.stdout


def test_a_folder_without_nanogpt_is_a_reason(tmp_path):
    done = benchmark("-k", "training and nano-B12-T64 and nanoGPT", "--nanogpt", str(tmp_path))
    assert f"--nanogpt {tmp_path} has no model.py" in done.stdout


def test_a_malformed_peak_is_rejected_before_anything_is_measured(monkeypatch):
    monkeypatch.setenv("GPTFAST_PEAK_FLOPS", "fast")
    done = benchmark("-k", "training")
    assert done.returncode == 4
    assert "GPTFAST_PEAK_FLOPS" in done.stderr
    assert "'fast'" in done.stderr
