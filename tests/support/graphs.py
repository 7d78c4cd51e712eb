"""Stand-ins for CUDA graphs on machines without a GPU: a replay calls the captured function again."""

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


class _Accesses(TorchDispatchMode):
    """Records the memory that operators use and did not allocate themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, torch.UntypedStorage] = {}  # references keep the addresses from reuse
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
    """Wrap a function to fail when it uses other memory than in its first call, as a replayed graph would."""
    first: list[_Accesses] = []

    def replay() -> None:
        with _Accesses() as accesses:
            function()
        first.append(accesses)
        moved = accesses.found.keys() ^ first[0].found.keys()
        assert not moved, f"{len(moved)} tensors have moved since the capture"
        del first[1:]

    return replay


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[torch.Generator | None]:
    """Replace CUDA graphs by `replayed` functions, except on a GPU; return the list of each capture's generator."""
    made: list[torch.Generator | None] = []
    capture = gptfast.cuda_graphs.capture

    def recorded(functions, device, generator=None):
        made.extend([generator] * len(functions))
        return capture(functions, device, generator) if DEVICE.type == "cuda" else [*map(replayed, functions)]

    monkeypatch.setattr(gptfast.cuda_graphs, "capture", recorded)
    return made
