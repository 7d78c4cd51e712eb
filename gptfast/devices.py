"""Which device to use, and the arithmetic that suits it."""

from __future__ import annotations

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = ("float32", "bfloat16", "float16")
# glibc's mallopt, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


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
    """The dtype of matrix products: one of `DTYPES`, or "auto", which is bfloat16 where the device multiplies in it.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if _multiplies_in_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}; accepted: auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def _multiplies_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.13 has it
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Run matrix products in `dtype`; parameters and the residual stream stay float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def seed(device: torch.device, value: int) -> None:
    """Seed what draws on a device and on the host. `torch.manual_seed` seeds every device, and takes its time."""
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


def keep_freed_memory() -> None:
    """Have this process keep the memory that tensors on the CPU leave, for those to come.

    The C library returns large blocks to the system, which hands them out again page by page, zeroed: in training on a
    CPU that is thousands of page faults a step, and a GPU waits while its tensors are copied for a checkpoint. Does
    nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for threshold in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(threshold, 2**30)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors on a GPU, or on a CPU this process, have held at a time; None where nobody counts."""
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
