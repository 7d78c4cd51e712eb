"""Which device to use, and the arithmetic that suits it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def resolve(name: str) -> torch.device:
    """The device called "auto", "cpu", "cuda", "cuda:N" or "mps"; "auto" is the best one there is.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *available]
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise ValueError(f"no device {name!r} here; accepted: auto, {', '.join(available)}")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: "float32", "bfloat16", or "auto", which is bfloat16 on GPUs that have it.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"unknown dtype {name!r}; accepted: auto, float32, bfloat16")
    return torch.float32 if name == "float32" else torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Run matrix products in `dtype`; parameters and the residual stream stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
