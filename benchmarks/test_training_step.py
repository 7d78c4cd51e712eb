"""Tokens per second of a training step, for each backend that runs here."""

import pytest
import torch

import gptfast
from benchmarks.steps import TrainingStep, machine
from gptfast import flops, peaks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_training_step(benchmark, backend):
    if backend == "triton" and DEVICE.type != "cuda":
        pytest.skip("Triton kernels are measured on CUDA devices; none was found")
    step = TrainingStep(gptfast, DEVICE, {}, backend=backend)
    benchmark.pedantic(step, rounds=50, warmup_rounds=10)
    speed = step.tokens / benchmark.stats.stats.median
    peak = peaks.peak_flops(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    reached = flops.training_flops_per_token(step.model.config) * speed
    benchmark.extra_info |= machine(DEVICE) | {
        "tokens_per_second": speed,
        "flops_per_second": reached,
        "mfu": None if peak is None else reached / peak,
        "peak": peaks.describe(DEVICE),
    }
