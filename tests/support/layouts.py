"""Memory layouts of tensors: those of real programs, and random ones from hypothesis."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Strides and offset of a tensor."""

    order: tuple[int, ...]  # of the dimensions in memory
    steps: tuple[int, ...]  # of each dimension: 2 leaves a gap after every element
    repeated: tuple[bool, ...]  # dimensions expanded from their first element
    offset: int

    def apply(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to this layout."""
        for dim, repeated in enumerate(self.repeated):
            if repeated:
                tensor = tensor[(slice(None),) * dim + (slice(0, 1),)].expand_as(tensor)
        spaced = [tensor.shape[dim] * self.steps[dim] for dim in self.order]
        # poison for the gaps, which must not be read
        poison = float("nan") if tensor.is_floating_point() else min(2**30, torch.iinfo(tensor.dtype).max)
        memory = torch.full((self.offset + math.prod(spaced),), poison, dtype=tensor.dtype, device=tensor.device)
        view = memory[self.offset :].view(spaced)[tuple(slice(None, None, self.steps[dim]) for dim in self.order)]
        view = view.permute([self.order.index(dim) for dim in range(len(self.order))])
        view.copy_(tensor)
        for dim, repeated in enumerate(self.repeated):
            if repeated:
                view = view[(slice(None),) * dim + (slice(0, 1),)].expand(tensor.shape)
        return view


def _spaced(dims: int, dim: int) -> Layout:
    steps = tuple(2 if i == dim % dims else 1 for i in range(dims))
    return Layout(tuple(range(dims)), steps, (False,) * dims, 0)


def _swapped(dims: int, first: int, second: int) -> Layout:
    order = list(range(dims))
    if dims > 0:
        order[first % dims], order[second % dims] = order[second % dims], order[first % dims]
    return Layout(tuple(order), (1,) * dims, (False,) * dims, 0)


def _repeated(dims: int, dim: int) -> Layout:
    return Layout(tuple(range(dims)), (1,) * dims, tuple(i == dim % dims for i in range(dims)), 0)


# layouts of real programs, as functions of the number of dimensions
LAYOUTS: dict[str, Callable[[int], Layout]] = {
    "transposed": lambda dims: _swapped(dims, -1, -2),
    "outer dimensions swapped": lambda dims: _swapped(dims, 0, -2),
    "gaps between elements": lambda dims: _spaced(dims, -1),
    "gaps between rows": lambda dims: _spaced(dims, -2),
    "gaps between batches": lambda dims: _spaced(dims, 0),
    "one row repeated": lambda dims: _repeated(dims, -2),
    "offset by one element": lambda dims: Layout(tuple(range(dims)), (1,) * dims, (False,) * dims, 1),
}


def layouts(dims: int) -> st.SearchStrategy[Layout]:
    def each(values: st.SearchStrategy) -> st.SearchStrategy[tuple]:
        return st.tuples(*[values] * dims)

    return st.builds(
        Layout,
        st.permutations(range(dims)).map(tuple),
        each(st.sampled_from([1, 2, 3, 1])),
        each(st.sampled_from([False, False, False, True])),
        st.sampled_from([0, 1]),
    )
