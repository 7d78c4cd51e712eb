"""FLOPs of a GPT in closed form, and the peaks they are held against."""

from __future__ import annotations

import functools
import time

import torch

from gptfast.config import GPTConfig

# Dense matrix peaks in FLOP/s (no sparsity), by a part of the name that CUDA gives the device. The first row whose
# part occurs in the name counts, so longer names stand before their prefixes. Sources: NVIDIA's data sheets.
_PEAKS: tuple[tuple[str, dict[torch.dtype, float]], ...] = (
    ("B200", {torch.bfloat16: 2250e12, torch.float16: 2250e12}),  # HGX B200 data sheet, half the sparse figure
    ("H200 NVL", {torch.bfloat16: 835.5e12, torch.float16: 835.5e12}),  # H200 data sheet, half the sparse figure
    ("H200", {torch.bfloat16: 989.5e12, torch.float16: 989.5e12}),  # H200 data sheet, SXM
    ("H100 PCIe", {torch.bfloat16: 756e12, torch.float16: 756e12}),  # H100 data sheet, PCIe
    ("H100 NVL", {torch.bfloat16: 835.5e12, torch.float16: 835.5e12}),  # H100 data sheet, NVL
    ("H100", {torch.bfloat16: 989.5e12, torch.float16: 989.5e12}),  # H100 data sheet, SXM
    ("A100", {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12}),  # A100 data sheet
)


def forward_flops_per_token(config: GPTConfig, length: int | None = None, causal: bool = False) -> int:
    """FLOPs of one forward pass per token: 2 for each weight of a matrix product, plus the attention scores.

    2 (12 L C^2 + C V) + 4 L C T, the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), which
    counts the full score matrix. Embedding look-ups, norms, activations and biases are not counted.

    Args:
        config: the model's shape.
        length: tokens per sequence T; `block_size` if None.
        causal: count only scores that the mask lets through, (T + 1) / 2 of T per token.
    """
    length = config.block_size if length is None else length
    weights = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size
    keys_times_two = length + 1 if causal else 2 * length
    return 2 * weights + 2 * config.n_layer * config.n_embd * keys_times_two


def training_flops_per_token(config: GPTConfig, length: int | None = None, causal: bool = False) -> int:
    """FLOPs of forward and backward per token: three times the forward. Arguments as `forward_flops_per_token`."""
    return 3 * forward_flops_per_token(config, length, causal)


def utilisation(rate: float, peak: float | None) -> float | None:
    """The share of `peak` that `rate` reached, both in the same unit; None where the peak is not known.

    Of model FLOPs per second it is the MFU (Chowdhery et al. 2022), of bytes that had to be read per second the MBU.
    """
    return None if peak is None else rate / peak


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The dense matrix peak of `device` for `dtype` in FLOP/s; None where the table has none, never a guess.

    For the CPU, whose data sheets give none, it is the rate of a large matrix product, measured once.
    """
    if device.type == "cpu":
        return _measured_cpu_peak(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for part, peaks in _PEAKS:
        if part in name:
            return peaks.get(dtype)
    return None


@functools.cache
def _measured_cpu_peak(dtype: torch.dtype, size: int = 1024) -> float:
    # a generator of its own: training draws from the global one
    a, b = torch.randn(2, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    a @ b
    best = float("inf")
    for _ in range(30):  # the first ones find the cores asleep
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
