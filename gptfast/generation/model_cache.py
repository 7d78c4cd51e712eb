"""Objects that generation derives from a model and keeps between calls: today the packed copy for decoding on CPUs."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import torch
import torch.nn as nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from gptfast.quantization import pack
from kernels import runtime

Model = TypeVar("Model")  # an `nn.Module`; unbounded, because callers know it by a Protocol

_MIN_NEW_TOKENS = 32  # packing takes as long as it saves in about 27


def for_decoding(model: Model, new_tokens: int = _MIN_NEW_TOKENS) -> Model:
    """Return the model with its linear layers packed by oneDNN, or the model itself where packing does not pay.

    The packed copy is for evaluation without gradients. It is kept on the model, and shares embeddings, norms and
    float32 weights with it.

    NOTE: writes through `parameter.data` bypass PyTorch's version counter and leave a stale bfloat16 copy.

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
    packed = ModelCache.of(module).get(("packed", autocast), lambda: _packed_copy(module))
    return model if packed is None else cast(Model, packed)


def _packed_copy(model: nn.Module) -> nn.Module | None:
    packed = pack(model)
    if packed is not None:
        delattr(packed, ModelCache.ATTRIBUTE)  # copied from the model: the cache would hold itself
    return packed


class ModelCache:
    """Objects derived from a model, kept on it until its weights, modules or attributes change.

    The cache is freed with the model. A copy or a pickle of the model starts with an empty one.

    NOTE: fused optimizers change weights without a new version, so a step of any optimizer clears all caches.
    """

    ATTRIBUTE = "_model_cache"

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._state: _State | None = None
        self._entries: dict[Hashable, Any] = {}
        _caches.add(self)
        _clear_after_optimizer_steps()

    @classmethod
    def of(cls, model: nn.Module) -> ModelCache:
        """Return the model's cache."""
        cache = vars(model).get(cls.ATTRIBUTE)
        if cache is None or cache._model() is not model:  # a shallow copy has the original's
            cache = cls(model)
            setattr(model, cls.ATTRIBUTE, cache)
        return cache

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Return the object of a key; build it if it is missing or the model has changed."""
        model = self._model()
        assert model is not None
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

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


_caches: weakref.WeakSet[ModelCache] = weakref.WeakSet()


@functools.cache
def _clear_after_optimizer_steps() -> None:
    def clear(*_: object) -> None:
        for cache in _caches:
            cache.clear()

    register_optimizer_step_post_hook(clear)


class _State:
    """All that a derived object depends on: attributes and hooks of modules, memory and versions of tensors."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._attributes = [v for m in modules for name, v in vars(m).items() if not name.startswith("_")]
        self._modules = [(type(m), bool(m._forward_hooks or m._forward_pre_hooks)) for m in modules]
        # a weak reference to memory, because an address is used again after it was freed
        self._tensors = [
            (StorageWeakRef(t.untyped_storage()), t.storage_offset(), t.stride(), t._version)
            for t in (*model.parameters(), *model.buffers())
        ]

    def matches(self, other: _State) -> bool:
        """True if nothing has changed."""
        same = len(self._attributes) == len(other._attributes)
        same = same and all(map(operator.is_, self._attributes, other._attributes))
        return same and self._modules == other._modules and self._tensors == other._tensors
