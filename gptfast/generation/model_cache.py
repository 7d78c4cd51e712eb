"""Packed copies of models for decoding on CPUs, kept between calls until their model changes."""

from __future__ import annotations

import functools
import math
import operator
import weakref
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from gptfast.quantization import PackedLinear, pack
from kernels import runtime
from kernels.pytorch_internals import StorageWeakRef, tensor_version

Model = TypeVar("Model")  # an `nn.Module`; unbounded, because callers know it by a Protocol

_ATTRIBUTE = "_packed_copy"  # of the model, so that both are freed together where they refer to each other
_MIN_NEW_TOKENS = 32  # packing takes as long as it saves in about 27


def for_decoding(model: Model, new_tokens: int = _MIN_NEW_TOKENS) -> Model:
    """Return the model with its linear layers packed by oneDNN, or the model itself where packing does not pay.

    The packed copy is for evaluation without gradients. It lives until the model is freed or changed, and shares
    embeddings, norms and float32 weights with it.

    NOTE: a write through `parameter.data` that changes less than a row or column of a weight may be missed. Write to
    the parameter under `torch.no_grad()` instead.

    Args:
        model: a `GPT` in evaluation mode; packed only if its backend runs "ffn" by "cpu". Modules with forward hooks
            are shared, unpacked.
        new_tokens: tokens to generate; weights other than float32 are packed for 32 or more.
    """
    module = cast(nn.Module, model)
    if cast(Any, model).backend["ffn"] != "cpu":  # "eager" stays plain PyTorch
        return model
    autocast = runtime.autocast_dtype(torch.device("cpu"))
    if new_tokens < _MIN_NEW_TOKENS and any(
        (autocast or p.dtype) != torch.float32 for p in module.parameters() if p.dim() == 2
    ):
        return model
    state, cached = _State(module, autocast), vars(module).get(_ATTRIBUTE)
    if cached is None or not cached.is_current(state):
        vars(module).pop(_ATTRIBUTE, None)  # else the new copy would hold the old one among its attributes
        cached = _Packed(module, state)
        setattr(module, _ATTRIBUTE, cached)
    return model if cached.copy is None else cast(Model, cached.copy)


class _State:
    """All but values that a packed copy depends on: attributes and hooks of modules, memory and versions of tensors."""

    def __init__(self, model: nn.Module, autocast: torch.dtype | None) -> None:
        modules = list(model.modules())
        self._attributes = [v for m in modules for name, v in vars(m).items() if not name.startswith("_")]
        self._others = [
            autocast,
            *((type(m), bool(m._forward_hooks or m._forward_pre_hooks)) for m in modules),
            # a weak reference to memory, because an address is used again after it was freed
            *(
                (StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.stride(), tensor_version(t))
                for t in (*model.parameters(), *model.buffers())
            ),
        ]

    def matches(self, other: _State) -> bool:
        """True if nothing has changed."""
        same = len(self._attributes) == len(other._attributes)
        return same and all(map(operator.is_, self._attributes, other._attributes)) and self._others == other._others


class _Packed:
    """A packed copy of a model, with samples of the weights that it holds in other memory.

    NOTE: fused optimizers change weights without a new version, so a step of any optimizer drops all copies.
    """

    def __init__(self, model: nn.Module, state: _State) -> None:
        self.copy = pack(model)
        self._state: _State | None = state
        layers = [] if self.copy is None else [m for m in self.copy.modules() if isinstance(m, PackedLinear)]
        shared = {t.data_ptr() for m in layers for t in (m.weight, m.bias) if t is not None and not t.is_mkldnn}
        sources = [m for m in model.modules() if layers and isinstance(m, nn.Linear)]
        views = [_sample(p.detach()) for m in sources for p in m.parameters() if p.data_ptr() not in shared]
        self._samples = [(view, view.clone()) for view in views]
        _instances.add(self)
        _drop_after_optimizer_steps()

    def is_current(self, state: _State) -> bool:
        """True if the model has not changed since."""
        same = self._state is not None and self._state.matches(state)
        return same and all(torch.equal(view, values) for view, values in self._samples)

    def drop(self) -> None:
        """Free the memory."""
        self.copy, self._state, self._samples = None, None, []

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies and pickles of a model begin without a packed copy


def _sample(weight: Tensor) -> Tensor:
    """View at least one element of each row and column of a contiguous weight [N, K]; all of another tensor."""
    if weight.dim() != 2 or not weight.is_contiguous():
        return weight
    rows, columns = weight.shape
    # at most a row, and no common factor with it: the column drifts
    return weight.flatten()[:: next(n for n in range(min(rows, columns), 0, -1) if math.gcd(n, columns) == 1)]


_instances: weakref.WeakSet[_Packed] = weakref.WeakSet()


@functools.cache
def _drop_after_optimizer_steps() -> None:
    def drop(*_: object) -> None:
        for packed in _instances:
            packed.drop()

    register_optimizer_step_post_hook(drop)
