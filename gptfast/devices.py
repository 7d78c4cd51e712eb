"""Devices and the dtype of matmuls on them, seeds and memory."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = ("float32", "bfloat16", "float16")
# glibc's mallopt, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def resolve(name: str) -> torch.device:
    """Return the device of a name: "cpu", "cuda", "cuda:N", "mps", or "auto" for the fastest available one.

    Raises:
        ValueError: the device is unknown or not available.
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
    """Return the dtype of matmuls: one of `DTYPES`, or "auto" for bfloat16 where the device has instructions for it.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16_matmul(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; accepted: auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def _has_bfloat16_matmul(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # from PyTorch 2.13 on
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return a context that runs matmuls in `dtype`; parameters and the residual stream stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def seed(device: torch.device, value: int) -> None:
    """Seed the default generators of a device and the host. `torch.manual_seed` seeds all devices, which is slow."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later tensors on the CPU.

    By default it returns large blocks to the system, which zeroes each page at its next use. Training on a CPU then
    takes thousands of page faults a step, and copies for a checkpoint stall a GPU. No effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(threshold, 2**30)


def peak_memory(device: torch.device) -> int | None:
    """Return peak bytes: of tensors on a GPU, of the process on the CPU, None on devices without a counter."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
