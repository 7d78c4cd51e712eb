"""Linear layers in the formats that decoding reads fastest: packed by oneDNN, or 8-bit integers."""

from __future__ import annotations

import copy
import functools
import operator
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

import kernels
from gptfast.backend import BackendModule
from kernels import onednn, reference, runtime

Model = TypeVar("Model")  # an `nn.Module`; unbounded, because callers below the GPT know it by a Protocol
Product = Callable[[nn.Linear, str | None], nn.Module | None]

_MIN_NEW_TOKENS = 32  # packing takes as long as it saves in about 27
_MIN_BYTES = 2**20  # of a weight; a oneDNN call starts 20 us later than `F.linear`


class PackedLinear(nn.Module):
    """`nn.Linear` and an optional activation by oneDNN on a CPU, in autocast's dtype where autocast is on."""

    def __init__(self, linear: nn.Linear, activation: str | None) -> None:
        super().__init__()
        self._dtype, self._activation = _compute_dtype(linear.weight), activation
        self._weight = onednn.pack(linear.weight.detach().to(self._dtype))
        self._bias = None if linear.bias is None else linear.bias.detach().to(self._dtype)

    def forward(self, x: Tensor) -> Tensor:
        return onednn.packed_linear(x.to(self._dtype), self._weight, self._bias, self._activation)


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
    quantized: Any = convert(model, Int8Linear)
    # the Triton loss multiplies by the head's weight, which it takes in floating point
    quantized.set_backend({**quantized.requested_backend, "loss": "eager"})
    return quantized


def for_decoding(model: Model, new_tokens: int = _MIN_NEW_TOKENS) -> Model:
    """Return the model with its linear layers packed by oneDNN, or the model itself where packing does not pay.

    The packed copy is for evaluation without gradients. It shares embeddings, norms and float32 weights with the
    model, and is kept on the model until a parameter, a module or an attribute changes.

    NOTE: writes through `parameter.data` bypass PyTorch's version counter and leave a stale bfloat16 copy.

    Args:
        model: a `GPT` in evaluation mode; packed only if its backend runs "ffn" by "cpu". Modules with forward hooks
            are shared, unpacked.
        new_tokens: tokens to generate; weights other than float32 are packed for 32 or more.
    """
    module = cast(nn.Module, model)
    if cast(Any, model).backend["ffn"] != "cpu":  # "eager" stays plain PyTorch
        return model
    matrices = [p for p in module.parameters() if p.dim() == 2]
    if all(p.device.type != "cpu" for p in matrices):
        return model
    if new_tokens < _MIN_NEW_TOKENS and any(_compute_dtype(p) != torch.float32 for p in matrices):
        return model
    key = ("packed", runtime.autocast_dtype(torch.device("cpu")))
    packed = ModelCache.of(module).get(module, key, lambda: _pack(module))
    return model if packed is None else cast(Model, packed)


def _pack(model: nn.Module) -> nn.Module | None:
    """A packed copy; None if the model is packed already or has nothing to pack."""
    if _has_packed(model):
        return None
    packed = convert(model, _packed_if_worth)
    return packed if _has_packed(packed) else None


def _has_packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedLinear) for module in model.modules())


def _packed_if_worth(linear: nn.Linear, activation: str | None) -> nn.Module | None:
    dtype = _compute_dtype(linear.weight)
    large = linear.weight.numel() * dtype.itemsize >= _MIN_BYTES
    return PackedLinear(linear, activation) if large and onednn.can_pack(linear.weight, dtype) else None


def _compute_dtype(weight: Tensor) -> torch.dtype:
    return runtime.autocast_dtype(weight.device) or weight.dtype


def convert(model: Model, product: Product) -> Model:
    """Copy a model with linear layers replaced; the copy has parameters of its own in the same memory.

    Args:
        model: an `nn.Module`. Submodules with forward hooks are shared, unconverted.
        product: maps a linear layer and the activation behind it to its replacement, or None to keep the layer. A
            module with a method `with_products(product)`, such as an MLP that hands its weights to one operator,
            replaces itself.
    """
    return cast(Model, _converted(cast(nn.Module, model), product))


def _converted(module: nn.Module, product: Product) -> nn.Module:
    if module._forward_hooks or module._forward_pre_hooks:
        return module
    if isinstance(module, nn.Linear):
        return product(module, None) or module
    with_products = getattr(module, "with_products", None)
    if with_products is not None:
        replaced = with_products(product)
        if replaced is not None:
            return replaced
        product = _keep
    other = copy.copy(module)
    vars(other).pop(ModelCache.ATTRIBUTE, None)
    # to move the copy, its parameters are replaced: they must not be the model's own
    other._parameters = {name: p if p is None else _frozen(p) for name, p in module._parameters.items()}
    other._modules = {name: child and _converted(child, product) for name, child in module._modules.items()}
    return other


def _keep(linear: nn.Linear, activation: str | None) -> None:
    """Leave a linear layer as it is."""


def _frozen(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)


class ModelCache:
    """Objects derived from a model, kept on it until its weights, modules or attributes change.

    The cache is freed with the model. A copy or a pickle of the model starts with an empty cache.

    NOTE: fused optimizers change weights without a new version, so a step of any optimizer clears all caches.
    """

    ATTRIBUTE = "_model_cache"

    def __init__(self) -> None:
        self._state: _State | None = None
        self._entries: dict[Hashable, Any] = {}
        _caches.add(self)
        _watch_optimizers()

    @classmethod
    def of(cls, model: nn.Module) -> ModelCache:
        """The cache of a model."""
        if cls.ATTRIBUTE not in vars(model):
            setattr(model, cls.ATTRIBUTE, cls())
        return vars(model)[cls.ATTRIBUTE]

    def get(self, model: nn.Module, key: Hashable, build: Callable[[], Any]) -> Any:
        """The object of a key, built when it is missing or the model has changed."""
        state = _State(model)
        if self._state is None or not self._state.matches(state):
            self.clear()
            self._state = state
        if key not in self._entries:
            self._entries[key] = build()
        return self._entries[key]

    def clear(self) -> None:
        """Drop all objects."""
        self._state = None
        self._entries.clear()

    def __reduce__(self) -> tuple[type[ModelCache], tuple[()]]:
        return ModelCache, ()


_caches: weakref.WeakSet[ModelCache] = weakref.WeakSet()


@functools.cache
def _watch_optimizers() -> None:
    def clear(*_: object) -> None:
        for cache in _caches:
            cache.clear()

    register_optimizer_step_post_hook(clear)


class _State:
    """All that a derived object can depend on: each module's attributes and hooks, each tensor's memory and version."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._attributes = [v for m in modules for name, v in vars(m).items() if not name.startswith("_")]
        self._modules = [(type(m), bool(m._forward_hooks or m._forward_pre_hooks)) for m in modules]
        # a weak reference, because the address of freed memory comes back
        self._tensors = [
            (StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.stride(), t._version)
            for t in (*model.parameters(), *model.buffers())
        ]

    def matches(self, other: _State) -> bool:
        """True if nothing has changed."""
        same = len(self._attributes) == len(other._attributes)
        same = same and all(map(operator.is_, self._attributes, other._attributes))
        return same and self._modules == other._modules and self._tensors == other._tensors
