"""Least times by the data sheet of a GPU, of operators and of a training step (Williams et al. 2009, "Roofline")."""

from __future__ import annotations

import torch

from benchmarks.measuring.bench import dtype_name
from benchmarks.measuring.processes import require_known
from gptfast import hardware
from gptfast.hardware import GPU


def gpu_named(name: str) -> GPU:
    """Look a GPU up in the table of `gptfast.hardware`. Raises ValueError for an unknown name."""
    known = {gpu.name: gpu for gpu in hardware.GPUS}
    require_known("GPU", name, known)
    return known[name]


def matrix_peak(gpu: GPU, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the dense FLOP/s for products of `dtype`. Raises ValueError if the data sheet has no figure."""
    if dtype_name(dtype) not in gpu.flops:
        raise ValueError(f"{gpu.name} has no known matrix peak in {dtype_name(dtype)}")
    return gpu.flops[dtype_name(dtype)]
