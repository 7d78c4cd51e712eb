"""The cases of the kernel suites, most telling first: a run whose time is short loses the last ones."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.cost_model import operators
from benchmarks.measuring.operator_bench import Case
from kernels import reference

BF16, FP32 = torch.bfloat16, torch.float32


def layer_norm(rows: int, width: int, dtype: torch.dtype) -> Case:
    return Case(
        suite="layer_norm",
        dims={"N": rows, "C": width},
        dtype=dtype,
        shapes={"x": (rows, width), "weight": (width,), "bias": (width,)},
        passes=operators.layer_norm(rows, width, dtype.itemsize),
        reference=reference.layer_norm,
    )


def add_layer_norm(rows: int, width: int, dtype: torch.dtype) -> Case:
    return Case(
        suite="add_layer_norm",
        dims={"N": rows, "C": width},
        dtype=dtype,
        shapes={"x": (rows, width), "residual": (rows, width), "weight": (width,), "bias": (width,)},
        passes=operators.add_layer_norm(rows, width, dtype.itemsize),
        reference=reference.add_layer_norm,
    )


def gelu_ffn(rows: int, width: int, dtype: torch.dtype) -> Case:
    hidden = 4 * width
    return Case(
        suite="gelu_ffn",
        dims={"N": rows, "C": width, "F": hidden},
        dtype=dtype,
        shapes={
            "x": (rows, width),
            "w_up": (hidden, width),
            "b_up": (hidden,),
            "w_down": (width, hidden),
            "b_down": (width,),
        },
        passes=operators.gelu_ffn(rows, width, hidden, dtype.itemsize),
        reference=reference.gelu_ffn,
    )


def ffn_up(rows: int, width: int, hidden: int, dtype: torch.dtype) -> Case:
    """The first product of a feed-forward alone, with the cheapest activation: a matrix product's own speed."""
    return Case(
        suite="ffn_up",
        dims={"N": rows, "C": width, "F": hidden},
        dtype=dtype,
        shapes={"x": (rows, width), "w_up": (hidden, width), "b_up": (hidden,)},
        passes=operators.linear(rows, width, hidden, dtype.itemsize),
        reference=lambda x, w_up, b_up: F.relu(F.linear(x, w_up, b_up)),
    )


def int8_linear(rows: int, width: int, outputs: int, dtype: torch.dtype) -> Case:
    """A linear layer of a few rows, whose weights are given as they are before they are rounded to 8 bits."""

    def rounded(x: Tensor, w_linear: Tensor) -> Tensor:
        q, scale = kernels.quantize_int8(w_linear.detach().float())
        # the gradient passes by what has none
        return F.linear(x, w_linear + (q * scale[:, None] - w_linear.detach()).to(w_linear.dtype))

    return Case(
        suite="int8_linear",
        dims={"M": rows, "K": width, "N": outputs},
        dtype=dtype,
        shapes={"x": (rows, width), "w_linear": (outputs, width)},
        passes=operators.int8_linear(rows, width, outputs, dtype.itemsize),
        reference=rounded,
    )


def causal_attention(batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype) -> Case:
    def model_layout(tensor: Tensor) -> Tensor:
        """[B, T, H, D] as the model's projection writes it, seen as [B, H, T, D]."""
        return tensor.transpose(1, 2)

    def last_head(tensor: Tensor) -> Tensor:
        """Scores of all heads in float32 would not fit: 64 GiB at 16 heads and 32k tokens."""
        return tensor[-1:, -1:]

    shape = (batch, length, heads, head_size)
    return Case(
        suite="causal_attention",
        dims={"B": batch, "H": heads, "T": length, "D": head_size},
        dtype=dtype,
        shapes={"q": shape, "k": shape, "v": shape},
        passes=operators.causal_attention(batch, heads, length, length, head_size, dtype.itemsize),
        reference=reference.causal_attention,
        strided=model_layout,
        part=last_head,
    )


def causal_attention_qkvpacked(batch: int, heads: int, length: int, head_size: int, dtype: torch.dtype) -> Case:
    def last_sequence(tensor: Tensor) -> Tensor:
        return tensor[-1:]

    return Case(
        suite="causal_attention_qkvpacked",
        dims={"B": batch, "H": heads, "T": length, "D": head_size},
        dtype=dtype,
        shapes={"qkv": (batch, length, 3, heads, head_size)},
        passes=operators.causal_attention(batch, heads, length, length, head_size, dtype.itemsize),
        reference=reference.causal_attention_qkvpacked,
        part=last_sequence,
    )


def decode_attention(batch: int, heads: int, keys: int, head_size: int, dtype: torch.dtype) -> Case:
    """A full cache: the whole of it is read."""
    cache = (batch, heads, keys, head_size)

    def decode(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return reference.decode_attention(q, k_cache, v_cache, full_lengths(batch, keys, q.device))

    return Case(
        suite="decode_attention",
        dims={"B": batch, "H": heads, "S": keys, "D": head_size},
        dtype=dtype,
        shapes={"q": (batch, heads, 1, head_size), "k_cache": cache, "v_cache": cache},
        passes=operators.causal_attention(batch, heads, 1, keys, head_size, dtype.itemsize),
        reference=decode,
    )


def linear_cross_entropy(rows: int, width: int, classes: int, dtype: torch.dtype) -> Case:
    def loss(x: Tensor, w_head: Tensor) -> Tensor:
        return reference.linear_cross_entropy(x, w_head, scattered_targets(x, classes))

    workspace = 2**29
    return Case(
        suite="linear_cross_entropy",
        dims={"N": rows, "C": width, "V": classes},
        dtype=dtype,
        shapes={"x": (rows, width), "w_head": (classes, width)},
        passes=operators.linear_cross_entropy(
            rows, width, classes, dtype.itemsize, chunks=-(-rows * classes * dtype.itemsize // workspace)
        ),
        reference=loss,
    )


def scattered_targets(x: Tensor, classes: int) -> Tensor:
    """A class for each row of x, the same on every run."""
    return torch.arange(x.shape[0], device=x.device) * 7919 % classes


def full_lengths(batch: int, keys: int, device: torch.device) -> Tensor:
    return torch.full((batch,), keys, dtype=torch.int32, device=device)


# compiling takes longer than measuring: not for every size
COMPILED = ("eager compiled", "FlexAttention")


def quick(case: Case) -> Case:
    """Without the providers that compile."""
    return dataclasses.replace(case, without=COMPILED)


# every x is well past the L2 cache of the GPUs at hand (50 MB on an H100)
LAYER_NORM = [
    layer_norm(131_072, 768, BF16),
    layer_norm(32_768, 4096, BF16),
    layer_norm(16_384, 8192, BF16),
    quick(layer_norm(65_536, 1024, BF16)),
    quick(layer_norm(65_536, 1600, BF16)),
    quick(layer_norm(65_536, 2048, BF16)),
    layer_norm(65_536, 768, FP32),
    quick(layer_norm(16_384, 4096, FP32)),
]
ADD_LAYER_NORM = [
    add_layer_norm(131_072, 768, BF16),
    add_layer_norm(32_768, 4096, BF16),
    quick(add_layer_norm(65_536, 1600, BF16)),
    quick(add_layer_norm(16_384, 8192, BF16)),
    quick(add_layer_norm(65_536, 768, FP32)),
]
FFN = [
    gelu_ffn(32_768, 768, BF16),
    gelu_ffn(32_768, 1600, BF16),
    gelu_ffn(16_384, 4096, BF16),
    gelu_ffn(8192, 8192, BF16),
    quick(gelu_ffn(32_768, 1024, BF16)),
    quick(gelu_ffn(16_384, 2048, BF16)),
    quick(gelu_ffn(8192, 768, FP32)),
]


FFN_UP = [ffn_up(8192, 8192, 8192, BF16), quick(ffn_up(32_768, 768, 3072, BF16))]


def _sixteen_thousand_tokens(length: int, head_size: int) -> Case:
    """16k tokens of width 2048, as FlashAttention's authors measure."""
    return causal_attention(16_384 // length, 2048 // head_size, length, head_size, BF16)


ATTENTION = [
    causal_attention(32, 12, 1024, 64, BF16),  # GPT-2's own shape
    *(_sixteen_thousand_tokens(length, head_size) for length in (4096, 1024, 16_384) for head_size in (64, 128)),
    *(quick(_sixteen_thousand_tokens(length, head_size)) for length in (2048, 8192) for head_size in (64, 128)),
    quick(causal_attention(4, 12, 1024, 64, FP32)),
]
PACKED = [causal_attention_qkvpacked(32, 12, 1024, 64, BF16), quick(causal_attention_qkvpacked(4, 16, 4096, 128, BF16))]
DECODE = [
    decode_attention(1, 12, 32_768, 64, BF16),
    decode_attention(1, 32, 32_768, 128, BF16),
    decode_attention(64, 12, 1024, 64, BF16),
    decode_attention(1, 12, 1024, 64, BF16),
]
# GPT-2's head and the widest layer of its largest size, for one sequence and for several
INT8 = [
    int8_linear(1, 768, 50_304, BF16),
    int8_linear(1, 1600, 6400, BF16),
    int8_linear(16, 1600, 6400, BF16),
    int8_linear(64, 768, 50_304, BF16),
]
LOSS = [
    linear_cross_entropy(32_768, 768, 50_304, BF16),
    quick(linear_cross_entropy(32_768, 768, 50_257, BF16)),
    quick(linear_cross_entropy(8192, 1600, 50_304, BF16)),
    quick(linear_cross_entropy(8192, 4096, 128_256, BF16)),
]

SUITES = {
    "layer_norm": LAYER_NORM,
    "add_layer_norm": ADD_LAYER_NORM,
    "gelu_ffn": FFN,
    "ffn_up": FFN_UP,
    "causal_attention": ATTENTION,
    "causal_attention_qkvpacked": PACKED,
    "decode_attention": DECODE,
    "int8_linear": INT8,
    "linear_cross_entropy": LOSS,
}
