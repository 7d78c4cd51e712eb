from __future__ import annotations

import pytest
import torch

from tests.support.generation import gpt
from tests.support.graphs import stand_in


@pytest.fixture
def reads(monkeypatch) -> list[tuple[int, tuple[int, ...]]]:
    """The embedding's address and the shape of the tokens at each call of a transformer."""
    calls: list[tuple[int, tuple[int, ...]]] = []
    kind = type(gpt(n_layer=1).transformer)
    forward = kind.forward

    def counted(self, idx, *rest):
        calls.append((self.wte.weight.data_ptr(), tuple(idx.shape)))
        return forward(self, idx, *rest)

    monkeypatch.setattr(kind, "forward", counted)
    return calls


@pytest.fixture
def captures(monkeypatch) -> list[torch.Generator | None]:
    """The generator of each CUDA graph capture; without a GPU, graphs are stand-ins."""
    return stand_in(monkeypatch)
