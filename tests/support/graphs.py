"""CUDA graphs in form alone, for machines without a GPU: what is captured is called at each replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gptfast.cuda_graphs
from tests.support.oracle import DEVICE


class _Places(TorchDispatchMode):
    """Notes the memory that operators read or write within it, and that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, torch.UntypedStorage] = {}  # held, so that nothing else gets the address
        self._own: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        for storage in _storages((args, kwargs)):
            if storage.data_ptr() not in self._own:
                self.found[storage.data_ptr()] = storage
        results = function(*args, **(kwargs or {}))
        self._own |= {storage.data_ptr() for storage in _storages(results)} - self.found.keys()
        return results


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [tensor.untyped_storage() for tensor in tensors if tensor.untyped_storage().nbytes() > 0]


def replayed(function: Callable[[], None]) -> Callable[[], None]:
    """The function, which fails where it finds other memory than at its first call: a graph would not follow it."""
    first: list[_Places] = []

    def replay() -> None:
        with _Places() as places:
            function()
        first.append(places)
        moved = places.found.keys() ^ first[0].found.keys()
        assert not moved, f"{len(moved)} tensors are not where they were when the graph was captured"
        del first[1:]

    return replay


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[torch.Generator | None]:
    """Have graphs be what `replayed` makes, but on a GPU, where they are real; the generator of each capture."""
    made: list[torch.Generator | None] = []
    capture = gptfast.cuda_graphs.capture

    def noted(functions, device, generator=None):
        made.extend([generator] * len(functions))
        return capture(functions, device, generator) if DEVICE.type == "cuda" else [*map(replayed, functions)]

    monkeypatch.setattr(gptfast.cuda_graphs, "capture", noted)
    return made
