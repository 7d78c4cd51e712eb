"""Linear layers in the formats that decoding reads fastest: packed by oneDNN, or 8-bit integers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor

import kernels
from gptfast.backend import BackendModule
from kernels import onednn, reference, runtime

Model = TypeVar("Model")  # a GPT, which is defined on a floor above
Product = Callable[[nn.Linear, str | None], nn.Module | None]

_MIN_BYTES = 2**20  # of a weight; a oneDNN call starts 20 us later than `F.linear`


class PackedLinear(nn.Module):
    """`nn.Linear` and an optional activation by oneDNN on a CPU, in autocast's dtype where autocast is on."""

    def __init__(self, linear: nn.Linear, activation: str | None) -> None:
        super().__init__()
        self.dtype, self._activation = _compute_dtype(linear.weight), activation
        self.weight = onednn.pack(linear.weight.detach().to(self.dtype))
        self.bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return onednn.packed_linear(x.to(self.dtype), self.weight, self.bias, self._activation)


class Int8Linear(BackendModule):
    """`nn.Linear` with an 8-bit weight and an optional activation."""

    def __init__(self, linear: nn.Linear, activation: str | None) -> None:
        super().__init__()
        weight, scale = kernels.quantize_int8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else _frozen(linear.bias)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.backend.int8_linear(x, self.weight, self.scale, self.bias)
        return y if self._activation is None else reference.activate(y, self._activation)


def quantize(model: Model) -> Model:
    """Copy a GPT with the weights of its linear layers as 8-bit integers, for generation and evaluation.

    Each row of a weight is rounded to multiples of its largest magnitude over 127 (`kernels.quantize_int8`). Embeddings
    and norms are shared with the given model. Decoding reads half the bytes of a bfloat16 model.

    Args:
        model: a `GPT`; unchanged. Modules with forward hooks are shared, unquantized.

    Raises:
        ValueError: a weight is not finite.
    """
    quantized: Any = _converted(cast(nn.Module, model), Int8Linear)
    # the Triton loss multiplies by the head's weight, which it takes in floating point
    quantized.set_backend({**quantized.requested_backend, "loss": "eager"})
    return quantized


def pack(model: nn.Module) -> nn.Module | None:
    """Copy a model with its linear layers packed by oneDNN; None if none can be or all are.

    Float32 weights are shared with the model: oneDNN reads them as they are.
    """

    def product(linear: nn.Linear, activation: str | None) -> nn.Module | None:
        dtype = _compute_dtype(linear.weight)
        large = linear.weight.numel() * dtype.itemsize >= _MIN_BYTES
        return PackedLinear(linear, activation) if large and onednn.can_pack(linear.weight, dtype) else None

    packed = None if _has_packed(model) else _converted(model, product)
    return packed if packed is not None and _has_packed(packed) else None


def _has_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return runtime.autocast_dtype(weight.device) or weight.dtype


def _converted(module: nn.Module, product: Product) -> nn.Module:
    """Copy a module with linear layers replaced; the copy has parameters of its own in the same memory.

    Args:
        module: modules with forward hooks are shared.
        product: maps a linear layer and the activation behind it to its replacement, or to None to keep the layer. A
            module that hands the weights of its linear layers to one operator, as `MLP` does, has a method
            `with_products(product)` that returns its replacement or None.
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return module
    if isinstance(module, nn.Linear):
        return product(module, None) or module
    with_products = getattr(module, "with_products", None)
    if with_products is not None:
        replacement = with_products(product)
        if replacement is not None:
            return replacement
        product = _keep
    other = copy.copy(module)
    # moving the copy replaces its parameters, which must not be the model's own
    other._parameters = {name: p if p is None else _frozen(p) for name, p in module._parameters.items()}
    other._modules = {name: child and _converted(child, product) for name, child in module._modules.items()}
    return other


def _keep(linear: nn.Linear, activation: str | None) -> None:
    return None


def _frozen(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)
