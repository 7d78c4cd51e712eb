"""The most that a device can do: dense FLOP/s and bytes/s, from data sheets for GPUs and measured for the CPU.

Figures are dense, never those for 2:4 sparsity, which data sheets print first. A GPU that the table does not know has
no peak, rather than that of one with a similar name; the environment variables below give it one.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

FLOPS_VARIABLE = "GPTFAST_PEAK_FLOPS"
"""Environment variable in FLOP/s that wins over table and measurement, for every device and dtype."""
BANDWIDTH_VARIABLE = "GPTFAST_PEAK_BANDWIDTH"
"""Environment variable in bytes/s that wins over table and measurement, for every device."""

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class GPU:
    """What the maker publishes about one GPU."""

    name: str
    """For people: the chip and, where that decides the figures, its form."""
    names: tuple[str, ...]
    """What `torch.cuda.get_device_name` calls it, less the maker. All words of the name have to agree (see `find`)."""
    flops: Mapping[str, float]
    """Dense peaks in FLOP/s of matrix products in "bfloat16", "float16", "tf32" and "float8", all accumulated in
    float32, and of plain "float32" without matrix units (AMD: with them). Absent is what the chip cannot do."""
    bandwidth: float
    """Of the device memory, in bytes/s."""
    memory: int
    """Device memory in bytes. A data sheet's "80 GB" are 80 GiB, of which the driver keeps a little."""
    processors: int
    """Streaming multiprocessors (NVIDIA) or compute units (AMD)."""
    l2_bytes: int
    """The L2 cache, as the device reports it."""
    source: str
    """The document that the FLOP/s and the bandwidth come from."""


_V100_SXM2 = {"float16": 125e12, "float32": 15.7e12}
_V100_PCIE = {"float16": 112e12, "float32": 14e12}
_V100_SOURCE = "NVIDIA V100 data sheet"
_A100 = {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12}
_A100_SOURCE = "NVIDIA A100 data sheet, the figures without sparsity"
# the white paper prints the dense figures; the data sheet rounds twice these, with sparsity, to 1,979 and 3,958
_H100_SXM = {"bfloat16": 989.4e12, "float16": 989.4e12, "tf32": 494.7e12, "float32": 66.9e12, "float8": 1978.9e12}
_HOPPER_NVL = {"bfloat16": 835.5e12, "float16": 835.5e12, "tf32": 417.5e12, "float32": 60e12, "float8": 1670.5e12}

GPUS: tuple[GPU, ...] = (
    GPU(
        name="V100 SXM2 16GB",
        names=("V100 SXM2 16GB",),
        flops=_V100_SXM2,
        bandwidth=900e9,
        memory=16 * GIB,
        processors=80,
        l2_bytes=6 * MIB,
        source=_V100_SOURCE,
    ),
    GPU(
        name="V100 SXM2 32GB",
        names=("V100 SXM2 32GB",),
        flops=_V100_SXM2,
        bandwidth=900e9,
        memory=32 * GIB,
        processors=80,
        l2_bytes=6 * MIB,
        source=_V100_SOURCE,
    ),
    GPU(
        name="V100 PCIe 16GB",
        names=("V100 PCIE 16GB",),
        flops=_V100_PCIE,
        bandwidth=900e9,
        memory=16 * GIB,
        processors=80,
        l2_bytes=6 * MIB,
        source=_V100_SOURCE,
    ),
    GPU(
        name="V100 PCIe 32GB",
        names=("V100 PCIE 32GB",),
        flops=_V100_PCIE,
        bandwidth=900e9,
        memory=32 * GIB,
        processors=80,
        l2_bytes=6 * MIB,
        source=_V100_SOURCE,
    ),
    GPU(
        name="T4",
        names=("T4",),
        flops={"float16": 65e12, "float32": 8.1e12},
        bandwidth=320e9,  # the memory's rate, 256 bits at 10 Gbit/s; the first data sheet says 300 GB/s
        memory=16 * GIB,
        processors=40,
        l2_bytes=4 * MIB,
        source="NVIDIA T4 data sheet; bandwidth: NVIDIA Turing architecture white paper",
    ),
    GPU(
        name="A10",
        names=("A10",),
        flops={"bfloat16": 125e12, "float16": 125e12, "tf32": 62.5e12, "float32": 31.2e12},
        bandwidth=600e9,
        memory=24 * GIB,
        processors=72,
        l2_bytes=6 * MIB,
        source="NVIDIA A10 data sheet, the figures without sparsity",
    ),
    GPU(
        name="A100 SXM 40GB",
        names=("A100 SXM4 40GB", "A100 SXM 40GB"),
        flops=_A100,
        bandwidth=1555e9,
        memory=40 * GIB,
        processors=108,
        l2_bytes=40 * MIB,
        source=_A100_SOURCE,
    ),
    GPU(
        name="A100 PCIe 40GB",
        names=("A100 PCIE 40GB",),
        flops=_A100,
        bandwidth=1555e9,
        memory=40 * GIB,
        processors=108,
        l2_bytes=40 * MIB,
        source=_A100_SOURCE,
    ),
    GPU(
        name="A100 SXM 80GB",
        names=("A100 SXM4 80GB", "A100 SXM 80GB"),
        flops=_A100,
        bandwidth=2039e9,
        memory=80 * GIB,
        processors=108,
        l2_bytes=40 * MIB,
        source=_A100_SOURCE,
    ),
    GPU(
        name="A100 PCIe 80GB",
        names=("A100 80GB PCIE",),
        flops=_A100,
        bandwidth=1935e9,
        memory=80 * GIB,
        processors=108,
        l2_bytes=40 * MIB,
        source=_A100_SOURCE,
    ),
    GPU(
        name="L4",
        names=("L4",),
        flops={"bfloat16": 121e12, "float16": 121e12, "tf32": 60e12, "float32": 30.3e12, "float8": 242.5e12},
        bandwidth=300e9,
        memory=24 * GIB,
        processors=58,
        l2_bytes=48 * MIB,
        source="NVIDIA L4 data sheet, dense = half of the figures with sparsity",
    ),
    GPU(
        name="L40S",
        names=("L40S",),
        # 362.05 is not half of the 733 beside it, which would be 366.5: the sheet's dense 16-bit figure is the L40's
        flops={"bfloat16": 362.05e12, "float16": 362.05e12, "tf32": 183e12, "float32": 91.6e12, "float8": 733e12},
        bandwidth=864e9,
        memory=48 * GIB,
        processors=142,
        l2_bytes=96 * MIB,
        source="NVIDIA L40S data sheet, the figures without sparsity",
    ),
    # GeForce: the tensor cores accumulate in float32, as PyTorch asks them to, at half the rate of float16; the figures
    # that are advertised are for float16, and from Ada on with sparsity on top
    GPU(
        name="RTX 3090",
        names=("GEFORCE RTX 3090",),
        flops={"bfloat16": 71e12, "float16": 71e12, "tf32": 35.6e12, "float32": 35.6e12},
        bandwidth=936e9,
        memory=24 * GIB,
        processors=82,
        l2_bytes=6 * MIB,
        source="NVIDIA Ampere GA102 architecture white paper, dense with FP32 accumulation: half of FP16 accumulation",
    ),
    GPU(
        name="RTX 4090",
        names=("GEFORCE RTX 4090",),
        flops={"bfloat16": 165.2e12, "float16": 165.2e12, "tf32": 82.6e12, "float32": 82.6e12, "float8": 330.3e12},
        bandwidth=1008e9,
        memory=24 * GIB,
        processors=128,
        l2_bytes=72 * MIB,
        source="NVIDIA Ada architecture white paper, dense with FP32 accumulation: half of FP16 accumulation",
    ),
    GPU(
        name="RTX 5090",
        names=("GEFORCE RTX 5090",),
        flops={"bfloat16": 209.5e12, "float16": 209.5e12, "tf32": 104.8e12, "float32": 104.8e12, "float8": 419e12},
        bandwidth=1792e9,
        memory=32 * GIB,
        processors=170,
        l2_bytes=96 * MIB,
        source="NVIDIA RTX Blackwell architecture white paper, dense with FP32 accumulation: half of FP16 accumulation",
    ),
    GPU(
        name="H100 SXM",
        names=("H100 80GB HBM3",),
        flops=_H100_SXM,
        bandwidth=3.35e12,
        memory=80 * GIB,
        processors=132,
        l2_bytes=50 * MIB,
        source="NVIDIA H100 architecture white paper, dense; bandwidth: NVIDIA H100 data sheet",
    ),
    GPU(
        name="H100 PCIe",
        names=("H100 PCIE",),
        flops={"bfloat16": 756e12, "float16": 756e12, "tf32": 378e12, "float32": 51.2e12, "float8": 1513e12},
        bandwidth=2039e9,  # what 5,120 bits at 1,593 MHz give; the product brief prints these and rounds to 2,000 GB/s
        memory=80 * GIB,
        processors=114,
        l2_bytes=50 * MIB,
        source="NVIDIA H100 architecture white paper, dense",
    ),
    GPU(
        name="H100 NVL",
        names=("H100 NVL",),
        flops=_HOPPER_NVL,
        bandwidth=3938e9,
        memory=94 * GIB,
        processors=132,
        l2_bytes=60 * MIB,
        source="NVIDIA H100 data sheet, dense = half of the figures with sparsity; bandwidth: H100 NVL product brief",
    ),
    GPU(
        name="H200 SXM",
        names=("H200",),
        flops=_H100_SXM,  # the same chip at the same clocks: the data sheets agree in every FLOP/s figure
        bandwidth=4.8e12,
        memory=141 * GIB,
        processors=132,
        l2_bytes=60 * MIB,
        source="NVIDIA H200 data sheet, dense = half of the figures with sparsity",
    ),
    GPU(
        name="H200 NVL",
        names=("H200 NVL",),
        flops=_HOPPER_NVL,
        bandwidth=4.8e12,
        memory=141 * GIB,
        processors=132,
        l2_bytes=60 * MIB,
        source="NVIDIA H200 data sheet, dense = half of the figures with sparsity",
    ),
    GPU(
        name="H20",
        names=("H20",),
        flops={"bfloat16": 148e12, "float16": 148e12, "tf32": 74e12, "float32": 44e12, "float8": 296e12},
        bandwidth=4e12,
        memory=96 * GIB,
        processors=78,
        l2_bytes=60 * MIB,
        source="NVIDIA H20 figures as the press printed them, dense; NVIDIA publishes no data sheet",
    ),
    GPU(
        name="B200",
        names=("B200",),
        flops={"bfloat16": 2250e12, "float16": 2250e12, "tf32": 1100e12, "float32": 75e12, "float8": 4500e12},
        bandwidth=7.7e12,  # 7,680 bits at 3,996 MHz; 8 TB/s and 192 GB were announced and are not what the device has
        memory=180 * GIB,
        processors=148,
        l2_bytes=253 * MIB // 2,
        source="NVIDIA HGX B200 data sheet, dense = half of the figures with sparsity",
    ),
    GPU(
        name="MI300X",
        names=("INSTINCT MI300X", "INSTINCT MI300X OAM"),
        flops={
            "bfloat16": 1307.4e12,
            "float16": 1307.4e12,
            "tf32": 653.7e12,
            "float32": 163.4e12,
            "float8": 2614.9e12,
        },
        bandwidth=5.3e12,
        memory=192 * GIB,
        processors=304,
        l2_bytes=32 * MIB,  # 4 MiB on each of 8 dies, of which PyTorch reports one; the 256 MiB behind them are L3
        source="AMD Instinct MI300X data sheet, the figures without sparsity",
    ),
)

_KEYS = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
    torch.float8_e4m3fn: "float8",
    torch.float8_e5m2: "float8",
    torch.float8_e4m3fnuz: "float8",
    torch.float8_e5m2fnuz: "float8",
}


def _words(name: str) -> frozenset[str]:
    # the maker comes and goes with the version of the driver
    return frozenset(re.split(r"[\s-]+", name.upper())) - {"NVIDIA", "TESLA", "AMD", ""}


_BY_WORDS = {_words(name): gpu for gpu in GPUS for name in gpu.names}


def find(device_name: str) -> GPU | None:
    """The GPU that `torch.cuda.get_device_name` calls `device_name`, or None if the table has none.

    Every word has to agree, in any order and case, words ending at a space or a hyphen: a word more is another chip
    ("RTX 4090 D", "RTX 4090 Laptop GPU") or a part of one ("A100-SXM4-80GB MIG 1g.10gb").
    """
    return _BY_WORDS.get(_words(device_name))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The dense matrix peak of `device` in FLOP/s; None where it is not known, never a guess.

    Args:
        device: a CUDA device is looked up by its name. The CPU's data sheets give no peak; its is the rate of a large
            matrix product, measured once. Other devices have none.
        dtype: of the factors. On CUDA float32 means TF32 while PyTorch is set to use that and the chip has it.

    Raises:
        ValueError: GPTFAST_PEAK_FLOPS, which wins over both, is not a positive finite number.
    """
    override = _override(FLOPS_VARIABLE, "FLOP/s such as 989e12")
    if override is not None:
        return override
    if device.type == "cpu":
        return _measured_cpu_flops(dtype)
    gpu = _gpu(device)
    if gpu is None or dtype not in _KEYS:
        return None
    # the getter of the older API raises once the newer one was used; this one knows both
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and "tf32" in gpu.flops:
        return gpu.flops["tf32"]
    return gpu.flops.get(_KEYS[dtype])


def peak_bandwidth(device: torch.device) -> float | None:
    """The memory bandwidth of `device` in bytes/s; None where it is not known, never a guess.

    Looked up by name for a CUDA device. For the CPU it is the rate of a large copy, measured once, counting the bytes
    that are read and those that are written.

    Raises:
        ValueError: GPTFAST_PEAK_BANDWIDTH, which wins over both, is not a positive finite number.
    """
    override = _override(BANDWIDTH_VARIABLE, "bytes/s such as 4.8e12")
    if override is not None:
        return override
    if device.type == "cpu":
        return _measured_cpu_bandwidth()
    gpu = _gpu(device)
    return None if gpu is None else gpu.bandwidth


def describe(device: torch.device) -> str:
    """One line for people: the device, its peaks, and where they come from or how to give them.

    Raises:
        ValueError: GPTFAST_PEAK_FLOPS or GPTFAST_PEAK_BANDWIDTH is not a positive finite number.
    """
    gpu = _gpu(device)
    dtype, source = torch.float32, "measured"
    if gpu is not None:
        name, source = gpu.name, gpu.source
        dtype = torch.bfloat16 if "bfloat16" in gpu.flops else torch.float16
    elif device.type == "cpu":
        name = "CPU"
    elif device.type == "cuda":
        name = f"unknown GPU {torch.cuda.get_device_name(device)!r}"
    else:
        name = f"unknown device {device.type!r}"
    flops, bandwidth = peak_flops(device, dtype), peak_bandwidth(device)
    if flops is None and bandwidth is None:
        return f"{name}: no peak, set {FLOPS_VARIABLE} and {BANDWIDTH_VARIABLE}"
    label = {torch.bfloat16: " bf16", torch.float16: " fp16", torch.float32: " fp32"}[dtype]
    compute, compute_source = _figure(flops, "FLOP/s", label, "peak", FLOPS_VARIABLE, source)
    memory, memory_source = _figure(bandwidth, "B/s", "", "bandwidth", BANDWIDTH_VARIABLE, source)
    if compute_source == memory_source:
        return f"{name}: {compute}, {memory} ({source})"
    return f"{name}: {compute} ({compute_source}), {memory} ({memory_source})"


def _figure(value: float | None, unit: str, label: str, what: str, variable: str, source: str) -> tuple[str, str]:
    """What `describe` says of one peak, and where that comes from."""
    if value is None:
        return f"no {what}", f"set {variable}"
    if variable in os.environ:
        return _readable(value, unit), variable  # whoever set it knows for which dtype
    return _readable(value, unit) + label, source


def _readable(value: float, unit: str) -> str:
    """Three digits with the prefix that suits them: "989 TFLOP/s"."""
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
    # a generator of its own: training draws from the global one
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    best, begun = float("inf"), time.perf_counter()
    for _ in range(31):  # the first ones find the cores asleep
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
        if start - begun > 1.0:  # CPUs without products of a dtype take seconds for one
            break
    return 2 * size**3 / best


@functools.cache
def _measured_cpu_bandwidth(size: int = 128 * MIB) -> float:
    # ones: pages that were never written all map to the same zeros, which then come from the cache
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)  # takes the page faults
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best
