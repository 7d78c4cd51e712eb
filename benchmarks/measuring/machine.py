"""The machine of a measurement: its description, its measured limits and the head of its result files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.utils import get_commit_info

import gptfast
from benchmarks import RESULTS_FORMAT
from benchmarks.measuring.bench import dtype_name
from benchmarks.measuring.timing import Call, kernel_times, percentiles
from gptfast import hardware
from gptfast.checkpoint.atomic_files import write_json

PEERS = ("flash-attn", "liger-kernel", "transformers")
MATRIX_DTYPES = (torch.bfloat16, torch.float32)


def default_device() -> torch.device:
    """Return the current CUDA device, or the CPU without one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def slug(device: torch.device) -> str:
    """Return the name of the device's folder of results, such as "cpu", "h200", "rtx-4090" or "a100-sxm4-80gb"."""
    if device.type != "cuda":
        return device.type
    name = torch.cuda.get_device_name(device).lower()
    name = re.sub(r"\b(nvidia|geforce|amd|instinct|tesla)\b", " ", name)
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """Collect device, driver and versions for the results."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "slug": slug(device),
        "kind": device.type,
        "driver": _driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gptfast": gptfast.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "peers": {name: _version(name) for name in PEERS},
        "peak": _peak(device),
    }


def _peak(device: torch.device) -> dict[str, Any]:
    """Peak rates that MFU and MBU refer to; without a name for a GPU that `hardware` does not list."""
    if device.type == "cpu":
        return {
            "name": "this CPU",
            "flops": {dtype_name(dtype): hardware.peak_flops(device, dtype) for dtype in MATRIX_DTYPES},
            "bandwidth": hardware.peak_bandwidth(device),
            "source": "measured: the best of several matrix products and copies",
        }
    gpu = hardware.find(torch.cuda.get_device_name(device))
    if gpu is None:
        return {"name": None, "flops": {}, "bandwidth": None, "source": None}
    return {"name": gpu.name, "flops": dict(gpu.flops), "bandwidth": gpu.bandwidth, "source": gpu.source}


def measure_limits(device: torch.device) -> dict[str, Any]:
    """Measure the best rates of this machine: bytes/s of a copy, read and written, and FLOP/s of a product by dtype.

    Medians on random normal data: on zeros a GPU draws less power and clocks higher.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn(2**29 if on_gpu else 2**25, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = _median_seconds(device, target.copy_, source)
    size, products = 8192 if on_gpu else 1024, {}
    for dtype in MATRIX_DTYPES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products[dtype_name(dtype)] = 2 * size**3 / _median_seconds(device, torch.mm, a, b)
    return {"copy_bytes_per_second": 2 * source.nbytes / copy, "matrix_flops_per_second": products}


def _median_seconds(device: torch.device, function: Callable[..., object], *tensors: torch.Tensor) -> float:
    times = kernel_times({function: Call(lambda _: function(*tensors))}, device)[function]
    return percentiles(times.device)["median"]


def result_head(device: torch.device) -> dict[str, Any]:
    """Return the fields that `benchmarks.report` needs in a file that pytest-benchmark does not write."""
    return {
        "gptfast_results": RESULTS_FORMAT,
        "datetime": datetime.now(UTC).isoformat(),
        "machine_info": {"gptfast": describe(device) | {"limits": measure_limits(device)}},
        "commit_info": get_commit_info(),
        "benchmarks": [],
        "not_measured": [],
    }


def save_results(path: Path, content: dict[str, Any]) -> None:
    """Write the results so far: the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return listed.partition("\n")[0].strip() or None
    return None


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as info:
        for line in info:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
