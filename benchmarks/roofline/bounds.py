"""Data-sheet limits of GPUs, and the least time of a training step (Williams et al. 2009, "Roofline")."""

from __future__ import annotations

import torch

from benchmarks.cost_model.training_step import StepCost
from gptfast import GPTConfig, hardware
from gptfast.hardware import GPU


def gpu_named(name: str) -> GPU:
    """Look a GPU up in the table of `gptfast.hardware`. Raises ValueError for an unknown name."""
    known = {gpu.name: gpu for gpu in hardware.GPUS}
    if name not in known:
        raise ValueError(f"unknown GPU {name!r}; accepted: {', '.join(known)}")
    return known[name]


def matrix_peak(gpu: GPU, dtype: torch.dtype) -> float | None:
    """Return the dense FLOP/s for products of `dtype`; None if the data sheet has no figure."""
    return gpu.flops.get(str(dtype).removeprefix("torch."))


def require_matrix_peak(gpu: GPU, dtype: torch.dtype) -> float:
    """Return the matrix peak. Raises ValueError if the data sheet has no figure."""
    peak = matrix_peak(gpu, dtype)
    if peak is None:
        raise ValueError(f"{gpu.name} has no known matrix peak in {str(dtype).removeprefix('torch.')}")
    return peak


def require_batch(batch: int, length: int) -> None:
    """Raise ValueError unless batch and length are at least 1."""
    if batch < 1 or length < 1:
        raise ValueError(f"batch and length must be at least 1, got {batch} and {length}")


def step_seconds(config: GPTConfig, batch: int, length: int, gpu: GPU) -> dict[str, float] | None:
    """Compute the least seconds of a training step by kind of operation; their sum is the step's.

    Products are in bf16, or in fp16 on a chip without bf16. None if neither peak is known.
    """
    peak = matrix_peak(gpu, torch.bfloat16) or matrix_peak(gpu, torch.float16)
    return None if peak is None else StepCost(config, batch, length).seconds(peak, gpu.bandwidth)
