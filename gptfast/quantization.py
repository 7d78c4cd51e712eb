"""A GPT for generation alone: the same weights in the form that decoding reads fastest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
import torch.nn as nn
from torch import Tensor

import kernels
from gptfast.backend import Switched
from kernels import onednn, reference, runtime

if TYPE_CHECKING:
    from gptfast.model import GPT

Product = Callable[[nn.Linear, str | None], nn.Module | None]  # None leaves the layer as it is
_WORTH_PACKING = 32  # new tokens; packing takes as long as it saves in about 27
_WORTH_BYTES = 2**20  # of a weight; calls of oneDNN begin 20 us later than those of `F.linear`


class FeedForward(nn.Module):
    """A feed-forward of two products, [..., C] -> [..., C]; the first applies the activation."""

    def __init__(self, c_fc: nn.Module, c_proj: nn.Module) -> None:
        super().__init__()
        self.c_fc, self.c_proj = c_fc, c_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_fc(x))


class PackedLinear(nn.Module):
    """`nn.Linear` on a CPU by oneDNN, with an activation behind it, in the dtype that autocast has where it is on."""

    def __init__(self, linear: nn.Linear, activation: str | None) -> None:
        super().__init__()
        dtype = runtime.autocast_dtype(linear.weight.device) or linear.weight.dtype
        self._dtype, self._activation = dtype, activation
        self._weight = onednn.pack(linear.weight.detach().to(dtype))
        self._bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return onednn.packed_linear(x.to(self._dtype), self._weight, self._bias, self._activation)


class Int8Linear(Switched, nn.Module):
    """`nn.Linear` with its weight as 8-bit integers, with an activation behind it."""

    def __init__(self, linear: nn.Linear, activation: str | None) -> None:
        super().__init__()
        weight, scale = kernels.quantize_int8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else _evaluated(linear.bias)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.backend.int8_linear(x, self.weight, self.scale, self.bias)
        return y if self._activation is None else reference.activate(y, self._activation)


def quantize(model: GPT) -> GPT:
    """A GPT for generation and evaluation whose products have weights of 8 bits, a byte each instead of two or four.

    Each row of a weight is rounded to multiples of its largest magnitude over 127 (`kernels.quantize_int8`); embeddings
    and norms stay as they are, and are the given model's own. Decoding reads half of what it reads in bfloat16.

    Args:
        model: stays as it is. Modules with hooks are taken over unquantized.

    Raises:
        ValueError: a weight that is not finite.
    """
    model = converted(model, Int8Linear)
    # the Triton loss takes the head's weight itself, and no integers
    model.set_backend({**model.backend, "loss": "eager"})
    return model


def for_decoding(model: GPT, new_tokens: int = _WORTH_PACKING) -> GPT:
    """The model with its products packed, on CPUs where oneDNN has them; elsewhere the model itself.

    Embeddings and norms are the model's own, and so are weights in float32: they need no packing. It is for evaluation
    without gradients; changes of the model's weights afterwards are not seen.

    Args:
        model: in evaluation mode. Modules with hooks stay as they are.
        new_tokens: how many will be generated: for few of them nothing is copied.
    """
    dtypes = {runtime.autocast_dtype(p.device) or p.dtype for p in model.parameters() if p.dim() == 2}
    few = new_tokens < _WORTH_PACKING and not dtypes <= {torch.float32}
    if few or _is_packed(model):
        return model
    found = converted(model, _packed_if_worth)
    return found if _is_packed(found) else model


def _is_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _packed_if_worth(linear: nn.Linear, activation: str | None) -> nn.Module | None:
    dtype = runtime.autocast_dtype(linear.weight.device) or linear.weight.dtype
    large = linear.weight.numel() * dtype.itemsize >= _WORTH_BYTES
    return PackedLinear(linear, activation) if large and onednn.can_pack(linear.weight, dtype) else None


def converted(model: GPT, product: Product) -> GPT:
    """A copy of the model in which `product` has made other modules of its linear layers; all else is shared."""
    return cast("GPT", _converted(model, product))


def _converted(module: nn.Module, product: Product) -> nn.Module:
    from gptfast.model import MLP

    if module._forward_hooks or module._forward_pre_hooks:
        return module
    if isinstance(module, nn.Linear):
        return product(module, None) or module
    if isinstance(module, MLP):  # it has an operator that takes its weights
        c_fc, c_proj = product(module.c_fc, module.activation), product(module.c_proj, None)
        if c_fc is not None and c_proj is not None:
            return FeedForward(c_fc, c_proj)
    other = copy.copy(module)
    # parameters of its own in the same memory: to move them is to move the copy alone
    other._parameters = {name: p if p is None else _evaluated(p) for name, p in module._parameters.items()}
    other._modules = {name: child and _converted(child, product) for name, child in module._modules.items()}
    return other


def _evaluated(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)
