"""A linear layer whose weights are 8-bit integers: for decoding, whose time is that of reading the weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.int8_launch import launch
from kernels.workload import CodegenCase, WarmupCase, Workload


def _compute(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    outputs = weight.shape[0]
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], outputs)
    bias = runtime.contiguous(bias)
    y = launch(x.reshape(-1, x.shape[-1]), weight.contiguous(), scale.contiguous(), bias)  # [M, N]
    return y.view(*x.shape[:-1], outputs)


_forward = torch.library.custom_op("gptfast::int8_linear", _compute, mutates_args=())


@_forward.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.gptfast.int8_linear)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x @ weight.T) * scale + bias with int8 weights, as `kernels.quantize_int8` makes them from those of a layer.

    For generation: no gradient. One row at a time takes as long as its weights take to be read, a byte for each, half
    of bfloat16's; x is not quantised (weight-only quantisation, as "W8A16" in Frantar et al. 2022, arXiv:2210.17323,
    who call it so for 4 bits). Up to 64 rows go through kernels that read int8, where every product is exact in
    float32 before it is added; for more the weights are made floating numbers in the dtype of x, rounded, and the
    product is PyTorch's. Bitwise the same on every run. Where Triton cannot run (CPU tensors), this is
    `kernels.reference.int8_linear`.

    Args:
        x: [..., K], float32, float16 or bfloat16, any strides.
        weight: [N, K] int8.
        scale: [N] float32, of each output.
        bias: [N] in any floating dtype, or None.

    Returns:
        [..., N], contiguous, in the dtype of x, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted, or
            that requires a gradient while gradients are recorded.
    """
    checks.int8_linear(x, weight, scale, bias)
    if not tile.launchable(x.device):
        return reference.int8_linear(x, weight, scale, bias)
    runtime.require_dtype("int8_linear", x)
    dtype = runtime.autocast_dtype(x.device)
    if dtype is not None:
        x = x.to(dtype)
    forward = _compute if runtime.can_skip_dispatcher(x, weight, scale, bias) else _forward
    return forward(x, weight, scale, bias)


def codegen_cases(dtype: torch.dtype) -> Iterator[CodegenCase]:
    """Layers of GPT-2 and GPT-2 XL and the output layer, for one row and for each tile of rows."""
    for outputs, width in ((768, 3072), (6400, 1600), (50_257, 768)):
        weight, scale = torch.empty(outputs, width, dtype=torch.int8), torch.empty(outputs, dtype=torch.float32)
        for rows in (1, 16, 32, 64):
            x, bias = torch.empty(rows, width, dtype=dtype), torch.empty(outputs, dtype=dtype)
            yield f"int8_linear N={outputs} K={width} M={rows}", _compute, (x, weight, scale, bias)


def warmup_cases(workload: Workload) -> Iterator[WarmupCase]:
    """Every linear layer, for as many rows as the kernels take."""
    if workload.stage != "decode" or not workload.int8:
        return
    model, width = workload.model, workload.model.n_embd
    layers = (  # outputs, inputs, has a bias
        (3 * width, width, model.has_qkv_bias),
        (width, width, model.bias),
        (4 * width, width, model.bias),
        (width, 4 * width, model.bias),
        (model.padded_vocab_size, width, False),
    )
    for outputs, inputs, has_bias in layers:
        weight, scale = reference.quantize_int8(workload.tensor(outputs, inputs).detach())
        bias = workload.tensor(outputs).detach() if has_bias else None
        # a tile holds 16, 32 or 64 rows; Triton compiles for multiples of 16, for others, and for 1
        for rows in (1, 2, 16, 17, 32, 33, 64):
            yield partial(int8_linear, workload.tensor(rows, inputs, dtype=workload.matmul_dtype), weight, scale, bias)
