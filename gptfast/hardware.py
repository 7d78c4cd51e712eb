"""Peak FLOP/s and memory bandwidth of devices: GPUs from data sheets, the CPU measured.

Peaks are dense; data sheets print the figures for 2:4 sparsity first. A GPU that is not in the table has no peak, even
if its name resembles a known one. Set the environment variables below for such a GPU.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLOPS_VARIABLE = "GPTFAST_PEAK_FLOPS"
"""Environment variable, in FLOP/s, that overrides table and measurement for every device and dtype."""
BANDWIDTH_VARIABLE = "GPTFAST_PEAK_BANDWIDTH"
"""Environment variable, in bytes/s, that overrides table and measurement for every device."""


@dataclass(frozen=True)
class GPU:
    """Published figures of one GPU.

    Args:
        name: chip and, where the figures depend on it, form factor.
        names: results of `torch.cuda.get_device_name` without the vendor; see `find`.
        flops: dense peaks in FLOP/s by "bfloat16", "float16", "tf32" and "float8" for matmuls that accumulate in
            float32, and "float32" without matrix units (AMD: with them). Formats that the chip lacks are absent.
        bandwidth: of the device memory, in bytes/s.
        source: document of the FLOP/s and the bandwidth.
    """

    name: str
    names: tuple[str, ...]
    flops: Mapping[str, float]
    bandwidth: float
    source: str


_V100 = "NVIDIA V100 data sheet"
_A100 = "NVIDIA A100 data sheet, the figures without sparsity"
_FP32_ACCUMULATION = "dense with FP32 accumulation: half of FP16 accumulation"
_HALVED = "dense = half of the figures with sparsity"

# Notes on rows:
#   T4          the bandwidth is 256 bits at 10 Gbit/s; the first data sheet says 300 GB/s
#   L40S        362.05 is not half of the sheet's 733, but the L40's dense 16-bit figure
#   RTX         tensor cores run at half rate with float32 accumulation, which PyTorch asks for; advertised figures are
#               for float16 accumulation, and from Ada on with sparsity
#   H100 SXM    the data sheet rounds twice the white paper's figures to 1,979 and 3,958
#   H100 PCIe   the bandwidth is 5,120 bits at 1,593 MHz; the product brief prints both and rounds to 2,000 GB/s
#   H200 SXM    has the chip and clocks of the H100 SXM: the data sheets agree in every FLOP/s figure
#   B200        the bandwidth is 7,680 bits at 3,996 MHz; 8 TB/s were announced
# fmt: off
_FORMATS = ("bfloat16", "float16", "tf32", "float32", "float8")
_TABLE: tuple[tuple, ...] = (
    # dense TFLOP/s:   bf16     fp16     tf32   fp32   fp8     GB/s   names; source
    ("V100 SXM2 16GB", None,    125,     None,  15.7,  None,   900,  "V100 SXM2 16GB", _V100),
    ("V100 SXM2 32GB", None,    125,     None,  15.7,  None,   900,  "V100 SXM2 32GB", _V100),
    ("V100 PCIe 16GB", None,    112,     None,  14,    None,   900,  "V100 PCIE 16GB", _V100),
    ("V100 PCIe 32GB", None,    112,     None,  14,    None,   900,  "V100 PCIE 32GB", _V100),
    ("T4",             None,    65,      None,  8.1,   None,   320,  "T4",
     "NVIDIA T4 data sheet; bandwidth: NVIDIA Turing architecture white paper"),
    ("A10",            125,     125,     62.5,  31.2,  None,   600,  "A10",
     "NVIDIA A10 data sheet, the figures without sparsity"),
    ("A100 SXM 40GB",  312,     312,     156,   19.5,  None,   1555, "A100 SXM4 40GB|A100 SXM 40GB", _A100),
    ("A100 PCIe 40GB", 312,     312,     156,   19.5,  None,   1555, "A100 PCIE 40GB", _A100),
    ("A100 SXM 80GB",  312,     312,     156,   19.5,  None,   2039, "A100 SXM4 80GB|A100 SXM 80GB", _A100),
    ("A100 PCIe 80GB", 312,     312,     156,   19.5,  None,   1935, "A100 80GB PCIE", _A100),
    ("L4",             121,     121,     60,    30.3,  242.5,  300,  "L4", f"NVIDIA L4 data sheet, {_HALVED}"),
    ("L40S",           362.05,  362.05,  183,   91.6,  733,    864,  "L40S",
     "NVIDIA L40S data sheet, the figures without sparsity"),
    ("RTX 3090",       71,      71,      35.6,  35.6,  None,   936,  "GEFORCE RTX 3090",
     f"NVIDIA Ampere GA102 architecture white paper, {_FP32_ACCUMULATION}"),
    ("RTX 4090",       165.2,   165.2,   82.6,  82.6,  330.3,  1008, "GEFORCE RTX 4090",
     f"NVIDIA Ada architecture white paper, {_FP32_ACCUMULATION}"),
    ("RTX 5090",       209.5,   209.5,   104.8, 104.8, 419,    1792, "GEFORCE RTX 5090",
     f"NVIDIA RTX Blackwell architecture white paper, {_FP32_ACCUMULATION}"),
    ("H100 SXM",       989.4,   989.4,   494.7, 66.9,  1978.9, 3350, "H100 80GB HBM3",
     "NVIDIA H100 architecture white paper, dense; bandwidth: NVIDIA H100 data sheet"),
    ("H100 PCIe",      756,     756,     378,   51.2,  1513,   2039, "H100 PCIE",
     "NVIDIA H100 architecture white paper, dense"),
    ("H100 NVL",       835.5,   835.5,   417.5, 60,    1670.5, 3938, "H100 NVL",
     f"NVIDIA H100 data sheet, {_HALVED}; bandwidth: H100 NVL product brief"),
    ("H200 SXM",       989.4,   989.4,   494.7, 66.9,  1978.9, 4800, "H200", f"NVIDIA H200 data sheet, {_HALVED}"),
    ("H200 NVL",       835.5,   835.5,   417.5, 60,    1670.5, 4800, "H200 NVL", f"NVIDIA H200 data sheet, {_HALVED}"),
    ("H20",            148,     148,     74,    44,    296,    4000, "H20",
     "NVIDIA H20 figures as the press printed them, dense; NVIDIA publishes no data sheet"),
    ("B200",           2250,    2250,    1100,  75,    4500,   7700, "B200", f"NVIDIA HGX B200 data sheet, {_HALVED}"),
    ("MI300X",         1307.4,  1307.4,  653.7, 163.4, 2614.9, 5300, "INSTINCT MI300X|INSTINCT MI300X OAM",
     "AMD Instinct MI300X data sheet, the figures without sparsity"),
)
# fmt: on


def _gpu_of_row(name: str, *row) -> GPU:
    tflops, (gb_per_second, names, source) = row[:5], row[5:]
    flops = {key: float(f"{value}e12") for key, value in zip(_FORMATS, tflops, strict=True) if value is not None}
    return GPU(name, tuple(names.split("|")), flops, gb_per_second * 1e9, source)


GPUS = tuple(_gpu_of_row(*row) for row in _TABLE)


def _words(name: str) -> frozenset[str]:
    # drivers differ in whether the name has the vendor
    return frozenset(re.split(r"[\s-]+", name.upper())) - {"NVIDIA", "TESLA", "AMD", ""}


_BY_WORDS = {_words(name): gpu for gpu in GPUS for name in gpu.names}


def find(device_name: str) -> GPU | None:
    """Look up a GPU by the result of `torch.cuda.get_device_name`; None if the table does not have it.

    All words, separated by spaces or hyphens, must agree, in any order and case. One word more is another chip
    ("RTX 4090 D", "RTX 4090 Laptop GPU") or a part of one ("A100-SXM4-80GB MIG 1g.10gb").
    """
    return _BY_WORDS.get(_words(device_name))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the dense matmul peak of `device` in FLOP/s, or None if it is unknown.

    Args:
        device: a CUDA device is looked up by name. For the CPU it is the rate of a large matmul, measured once per
            process. Other devices have none.
        dtype: of the factors. On CUDA float32 means TF32 where PyTorch is set to use it and the chip has it.

    Raises:
        ValueError: GPTFAST_PEAK_FLOPS is not a positive finite number.
    """
    if (override := _override(FLOPS_VARIABLE, "FLOP/s such as 989e12")) is not None:
        return override
    if device.type == "cpu":
        return _measured_cpu_flops(dtype)
    gpu = _gpu(device)
    if gpu is None:
        return None
    # the older getter, `allow_tf32`, raises once a program has used `fp32_precision`
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and "tf32" in gpu.flops:
        return gpu.flops["tf32"]
    return gpu.flops.get(str(dtype).removeprefix("torch.").partition("_")[0])  # "float8_e5m2" is "float8"


def peak_bandwidth(device: torch.device) -> float | None:
    """Return the memory bandwidth of `device` in bytes/s, or None if it is unknown.

    A CUDA device is looked up by name. For the CPU it is the rate of a large copy, bytes read plus bytes written,
    measured once per process.

    Raises:
        ValueError: GPTFAST_PEAK_BANDWIDTH is not a positive finite number.
    """
    if (override := _override(BANDWIDTH_VARIABLE, "bytes/s such as 4.8e12")) is not None:
        return override
    if device.type == "cpu":
        return _measured_cpu_bandwidth()
    gpu = _gpu(device)
    return None if gpu is None else gpu.bandwidth


def describe(device: torch.device) -> str:
    """Describe a device in one line: its peaks and their source, or how to set them.

    Raises:
        ValueError: GPTFAST_PEAK_FLOPS or GPTFAST_PEAK_BANDWIDTH is not a positive finite number.
    """
    gpu = _gpu(device)
    dtype, label, source = torch.float32, " fp32", "measured"
    if gpu is not None:
        name, source = gpu.name, gpu.source
        dtype, label = (torch.bfloat16, " bf16") if "bfloat16" in gpu.flops else (torch.float16, " fp16")
    elif device.type == "cpu":
        name = "CPU"
    elif device.type == "cuda":
        name = f"unknown GPU {torch.cuda.get_device_name(device)!r}"
    else:
        name = f"unknown device {device.type!r}"
    flops, bandwidth = peak_flops(device, dtype), peak_bandwidth(device)
    if flops is None and bandwidth is None:
        return f"{name}: no peak, set {FLOPS_VARIABLE} and {BANDWIDTH_VARIABLE}"
    compute, compute_source = _figure(flops, "FLOP/s", label, "peak", FLOPS_VARIABLE, source)
    memory, memory_source = _figure(bandwidth, "B/s", "", "bandwidth", BANDWIDTH_VARIABLE, source)
    if compute_source == memory_source:
        return f"{name}: {compute}, {memory} ({source})"
    return f"{name}: {compute} ({compute_source}), {memory} ({memory_source})"


def _figure(value: float | None, unit: str, label: str, kind: str, variable: str, source: str) -> tuple[str, str]:
    """Format one peak; return the text and its source."""
    if value is None:
        return f"no {kind}", f"set {variable}"
    if variable in os.environ:
        return _with_prefix(value, unit), variable  # the variable names no dtype
    return _with_prefix(value, unit) + label, source


def _with_prefix(value: float, unit: str) -> str:
    """Format to three digits with an SI prefix: "989 TFLOP/s"."""
    value = float(f"{value:.3g}")  # rounded first: 999.9e9 is 1 T, not 1000 G
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:g} {prefix}{unit}"
    return f"{value:g} {unit}"


def _gpu(device: torch.device) -> GPU | None:
    return find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _override(variable: str, accepted: str) -> float | None:
    text = os.environ.get(variable)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{variable} is {text!r}; accepted: a positive finite number of {accepted}")
    return value


@functools.cache
def _measured_cpu_flops(dtype: torch.dtype, size: int = 1024) -> float:
    # a separate generator: training draws from the global one
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return 2 * size**3 / _fastest(lambda: a @ b, calls=31)  # cores raise their clock during the first calls


@functools.cache
def _measured_cpu_bandwidth(size: int = 2**27) -> float:
    # ones: pages that were never written all map to one page of zeros, which stays in the cache
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)  # takes the page faults
    return 2 * size / _fastest(lambda: target.copy_(source), calls=10)


def _fastest(function: Callable[[], object], calls: int) -> float:
    """Return the seconds of the fastest call, of those within a second: a dtype without instructions is slow."""
    best, begun = math.inf, time.perf_counter()
    for _ in range(calls):
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
        if start - begun > 1.0:
            break
    return best
