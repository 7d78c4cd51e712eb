"""The operators that are benchmarked: one entry each, with its cases, its peers and its cost.

The suites, the roofline, the profiler and the error measurement iterate over `OPERATORS`. Entries are in the order of
their share of a training step or of their value as evidence, since a short time budget drops the last ones.
"""

from __future__ import annotations

from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from benchmarks.cost_model import operators as costs
from benchmarks.measuring.bench import UnavailableError
from benchmarks.measuring.operator_bench import FORWARD, Case, Function, Operator, Provider, Sizes, triton
from kernels.pytorch_internals import addmm_activation, int8pack_mm


def bf16(*values: int, compiled: bool = True) -> Sizes:
    return Sizes(values, torch.bfloat16, compiled)


def fp32(*values: int, compiled: bool = True) -> Sizes:
    return Sizes(values, torch.float32, compiled)


def _bind_lengths(decode: Function, case: Case) -> Function:
    """Add the lengths of a full cache, so that all of it is read."""

    @lru_cache
    def lengths(device: torch.device) -> Tensor:
        return torch.full((case.dims["B"],), case.dims["S"], dtype=torch.int32, device=device)

    return lambda q, k_cache, v_cache: decode(q, k_cache, v_cache, lengths(q.device))


def _bind_int8(linear: Function, case: Case) -> Function:
    """Quantize the weight of a linear layer once, and call `linear` with its integers and scales."""
    quantize = lru_cache(maxsize=1)(lambda weight: kernels.quantize_int8(weight.detach().float()))
    return lambda x, w_linear: linear(x, *quantize(w_linear))


def _bind_targets(loss: Function, case: Case) -> Function:
    """Add a target for each row of x, the same on every run."""
    return lambda x, w_head: loss(x, w_head, torch.arange(x.shape[0], device=x.device) * 7919 % case.dims["V"])


def _sdpa(backend: SDPBackend, case: Case) -> Function:
    """PyTorch's attention with one backend: its own choice is the first backend that fits, not the fastest."""
    if case.dtype == torch.float32:
        raise UnavailableError("takes float16 and bfloat16 only")
    return sdpa_kernel(backend)(partial(F.scaled_dot_product_attention, is_causal=True))


def _flex_attention(case: Case) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not torch.cuda.is_available():
        raise UnavailableError("FlexAttention has no backward on the CPU")
    length = case.dims["T"]
    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device="cuda")
    return partial(torch.compile(flex_attention, fullgraph=True, dynamic=False), block_mask=mask)


def _addmm_gelu(case: Case) -> Function:
    """Products with the GELU epilogue of cuBLASLt, by tanh, which keeps nothing for a backward."""
    if not torch.cuda.is_available():
        raise UnavailableError("torch._addmm_activation computes GELU by tanh on CUDA only")
    return lambda x, w_up, b_up, w_down, b_down: torch.addmm(
        b_down, addmm_activation(b_up, x, w_up.t(), use_gelu=True), w_down.t()
    )


def _addmm_relu(case: Case) -> Function:
    return lambda x, w_up, b_up: addmm_activation(b_up, x, w_up.t(), use_gelu=False)


def _ffn_up_kernel(case: Case) -> Function:
    """The fused product as `gelu_ffn` launches it, with the cheapest activation."""
    from kernels.ffn import launch_up

    return lambda x, w_up, b_up: launch_up(x, w_up, b_up, "relu", save_z=False, implementation="fused")[0]


def _int8pack_mm(case: Case) -> Function:
    """PyTorch's int8 product; its scales are in the dtype of x."""
    if case.dtype != torch.bfloat16:
        raise UnavailableError("torch._weight_int8pack_mm takes bfloat16 only")
    return _bind_int8(lambda x, q, scale: int8pack_mm(x, q, scale.to(x.dtype)), case)


def _chunked_loss(case: Case) -> Function:
    """PyTorch's loss, in chunks of its choice."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"PyTorch {torch.__version__} has no linear_cross_entropy; 2.13 has")
    return _bind_targets(partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()), case)


def _liger(module: str, name: str) -> Any:
    try:
        return getattr(import_module(f"liger_kernel.ops.{module}"), name).apply
    except ImportError as error:
        raise UnavailableError(f"liger-kernel cannot be imported: {error}") from error


def _liger_loss(case: Case) -> Function:
    loss = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    return _bind_targets(lambda *tensors: loss(*tensors)[0], case)


def _liger_layer_norm(case: Case) -> Function:
    norm = _liger("layer_norm", "LigerLayerNormFunction")
    return lambda x, weight, bias: norm(x, weight, bias, 1e-5)


def _liger_add_layer_norm(case: Case) -> Function:
    """An addition and Liger's norm: Liger fuses the addition with RMS norm only."""
    norm: Any = _liger_layer_norm(case)

    def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, weight, bias), h

    return add_and_norm


_ENTRIES = (
    Operator(
        name="causal_attention",
        dims=("B", "H", "T", "D"),
        shapes=lambda B, H, T, D: dict.fromkeys(("q", "k", "v"), (B, T, H, D)),
        cost=lambda B, H, T, D, itemsize: costs.causal_attention(B, H, T, T, D, itemsize),
        # GPT-2's shape, then 16k tokens of width 2048, as in the FlashAttention papers
        sizes=(
            bf16(32, 12, 1024, 64),
            *(bf16(16_384 // T, 2048 // D, T, D) for T in (4096, 1024, 16_384) for D in (64, 128)),
            *(bf16(16_384 // T, 2048 // D, T, D, compiled=False) for T in (2048, 8192) for D in (64, 128)),
            fp32(4, 12, 1024, 64, compiled=False),
        ),
        accuracy_sizes=((8, 12, 1024, 64), (1, 2, 256, 64)),
        peers=(
            Provider("SDPA FlashAttention-2", partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
            Provider("SDPA cuDNN", partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
            Provider("FlexAttention", _flex_attention, compiles=True),
        ),
        layout=lambda tensor: tensor.transpose(1, 2),  # [B, T, H, D] as the projection writes it, as [B, H, T, D]
        compared=lambda tensor: tensor[-1:, -1:],  # one head: all scores in float32 would take 64 GiB
    ),
    Operator(
        name="causal_attention_qkvpacked",
        dims=("B", "H", "T", "D"),
        shapes=lambda B, H, T, D: {"qkv": (B, T, 3, H, D)},
        cost=lambda B, H, T, D, itemsize: costs.causal_attention(B, H, T, T, D, itemsize),
        sizes=(bf16(32, 12, 1024, 64), bf16(4, 16, 4096, 128, compiled=False)),
        accuracy_sizes=((8, 12, 1024, 64), (1, 2, 256, 64)),
        compared=lambda tensor: tensor[-1:],
    ),
    Operator(
        name="decode_attention",
        dims=("B", "H", "S", "D"),
        shapes=lambda B, H, S, D: {"q": (B, H, 1, D), "k_cache": (B, H, S, D), "v_cache": (B, H, S, D)},
        cost=lambda B, H, S, D, itemsize: costs.causal_attention(B, H, 1, S, D, itemsize),
        sizes=tuple(
            bf16(*values, compiled=False)
            for values in ((1, 12, 32_768, 64), (1, 32, 32_768, 128), (64, 12, 1024, 64), (1, 12, 1024, 64))
        ),
        accuracy_sizes=((8, 12, 1024, 64), (2, 2, 512, 64)),
        # a full cache needs no mask
        peers=(Provider("SDPA", lambda case: F.scaled_dot_product_attention),),
        modes=FORWARD,
        bind=_bind_lengths,
    ),
    Operator(
        name="gelu_ffn",
        dims=("N", "C", "F"),
        shapes=lambda N, C, F: {"x": (N, C), "w_up": (F, C), "b_up": (F,), "w_down": (C, F), "b_down": (C,)},
        cost=costs.gelu_ffn,
        sizes=(
            bf16(32_768, 768, 3072),
            bf16(32_768, 1600, 6400),
            bf16(16_384, 4096, 16_384),
            bf16(8192, 8192, 32_768),
            bf16(32_768, 1024, 4096, compiled=False),
            bf16(16_384, 2048, 8192, compiled=False),
            fp32(8192, 768, 3072, compiled=False),
        ),
        accuracy_sizes=((8192, 768, 3072), (128, 256, 1024)),
        peers=(
            # the implementations that `gelu_ffn` chooses from
            Provider("triton fused", lambda case: partial(triton(case), implementation="fused")),
            Provider("triton unfused", lambda case: partial(triton(case), implementation="unfused")),
            Provider("_addmm_activation", _addmm_gelu, FORWARD),
        ),
    ),
    Operator(
        name="linear_cross_entropy",
        dims=("N", "C", "V"),
        shapes=lambda N, C, V: {"x": (N, C), "w_head": (V, C)},
        cost=costs.linear_cross_entropy,
        sizes=(
            bf16(32_768, 768, 50_304),
            bf16(32_768, 768, 50_257, compiled=False),
            bf16(8192, 1600, 50_304, compiled=False),
            bf16(8192, 4096, 128_256, compiled=False),
        ),
        accuracy_sizes=((8192, 768, 50_304), (128, 256, 1024)),
        peers=(Provider("Liger-Kernel", _liger_loss), Provider("PyTorch chunked", _chunked_loss)),
        modes=("forward", "both"),  # the forward computes the gradients, the backward only scales them
        bind=_bind_targets,
    ),
    Operator(
        name="int8_linear",
        dims=("M", "K", "N"),
        shapes=lambda M, K, N: {"x": (M, K), "w_linear": (N, K)},
        cost=costs.int8_linear,
        # GPT-2's head and the widest layer of its largest size, for one sequence and for several
        sizes=tuple(
            bf16(*values, compiled=False)
            for values in ((1, 768, 50_304), (1, 1600, 6400), (16, 1600, 6400), (64, 768, 50_304))
        ),
        accuracy_sizes=((16, 768, 50_304), (4, 256, 512)),
        # F.linear takes the weights before quantization
        peers=(Provider("_weight_int8pack_mm", _int8pack_mm), Provider("F.linear", lambda case: F.linear)),
        modes=FORWARD,
        bind=_bind_int8,
    ),
    Operator(
        name="ffn_up",  # the first product of `gelu_ffn` alone, to compare with a matrix product's speed
        dims=("N", "C", "F"),
        shapes=lambda N, C, F: {"x": (N, C), "w_up": (F, C), "b_up": (F,)},
        cost=costs.linear,
        sizes=(bf16(8192, 8192, 8192, compiled=False), bf16(32_768, 768, 3072, compiled=False)),
        accuracy_sizes=None,
        peers=(Provider("_addmm_activation", _addmm_relu),),  # cuBLASLt's ReLU epilogue
        modes=FORWARD,
        kernel=_ffn_up_kernel,
        reference=lambda x, w_up, b_up: F.relu(F.linear(x, w_up, b_up)),
    ),
    Operator(
        name="layer_norm",
        dims=("N", "C"),
        shapes=lambda N, C: {"x": (N, C), "weight": (C,), "bias": (C,)},
        cost=costs.layer_norm,
        # every x exceeds the L2 cache of current GPUs (50 MB on an H100)
        sizes=(
            bf16(131_072, 768),
            bf16(32_768, 4096),
            bf16(16_384, 8192),
            bf16(65_536, 1024, compiled=False),
            bf16(65_536, 1600, compiled=False),
            bf16(65_536, 2048, compiled=False),
            fp32(65_536, 768),
            fp32(16_384, 4096, compiled=False),
        ),
        accuracy_sizes=((8192, 768), (256, 768)),
        peers=(Provider("Liger-Kernel", _liger_layer_norm),),
    ),
    Operator(
        name="add_layer_norm",
        dims=("N", "C"),
        shapes=lambda N, C: {"x": (N, C), "residual": (N, C), "weight": (C,), "bias": (C,)},
        cost=costs.add_layer_norm,
        sizes=(
            bf16(131_072, 768),
            bf16(32_768, 4096),
            bf16(65_536, 1600, compiled=False),
            bf16(16_384, 8192, compiled=False),
            fp32(65_536, 768, compiled=False),
        ),
        accuracy_sizes=((8192, 768), (256, 768)),
        peers=(Provider("Liger-Kernel", _liger_add_layer_norm),),
    ),
)
OPERATORS = {operator.name: operator for operator in _ENTRIES}
