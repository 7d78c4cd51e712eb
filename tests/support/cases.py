"""A call of an operator under test, and the table entry of the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference
from kernels.tuning import Config
from tests.support.oracle import DEVICE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPERATORS: dict[str, Operator] = {}  # by name; the entries are in operators.py
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call of an operator: the shapes of its tensors by argument name, None for None, and its other arguments."""

    operator: str
    shapes: dict[str, Shape | None]
    options: dict[str, Any] = field(default_factory=dict)
    in_float32: tuple[str, ...] = ()  # arguments in float32 beside half precision
    in_half: tuple[str, ...] = ()  # the reverse: arguments in bfloat16 beside float32

    def __str__(self) -> str:
        shapes = "-".join("none" if s is None else "x".join(map(str, s)) for s in self.shapes.values())
        options = [f"{name}={value}" for name, value in self.options.items()]
        dtypes = [f"{name}-float32" for name in self.in_float32] + [f"{name}-bfloat16" for name in self.in_half]
        return "-".join([self.operator, shapes, *options, *dtypes])

    @property
    def row(self) -> Operator:
        return OPERATORS[self.operator]

    @property
    def kernel(self) -> Callable[..., Any]:
        return getattr(kernels, self.operator)

    @property
    def reference(self) -> Callable[..., Any]:
        """The reference. With dropout, it takes the mask that the operator draws for this seed and shape."""
        if not self.has_dropout:
            return getattr(reference, self.operator)
        kept = self.row.dropout.mask(self)
        return lambda seed, **arguments: self.row.dropout.reference(**arguments, kept=kept)

    @property
    def has_dropout(self) -> bool:
        return self.options.get("dropout_p", 0.0) > 0.0

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes in which this case differs from others."""
        if self.in_half:
            return (torch.float32,)
        return DTYPES[1:] if self.in_float32 else DTYPES

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
        """Draw the tensors, by default from a normal distribution."""
        generator = torch.Generator().manual_seed(seed)
        return {name: self.draw(name, dtype, generator) for name in self.shapes}

    def draw(self, name: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
        if (shape := self.shapes[name]) is None:
            return None
        dtype = torch.float32 if name in self.in_float32 else torch.bfloat16 if name in self.in_half else dtype
        return self.row.draws.get(name, _normal)(self, shape, dtype, generator).to(DEVICE)

    def upstream(self, dtype: torch.dtype, used: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """Draw a gradient for each result, or for those that are `used`."""
        if not self.row.differentiable:
            return {}
        shape, generator = self.row.result_shape(self), torch.Generator().manual_seed(1)
        drawn = {name: _normal(self, shape, dtype, generator).to(DEVICE) for name in self.row.results}
        return {name: gradient for name, gradient in drawn.items() if used is None or name in used}

    def largest_intermediate(self) -> int:
        """Return the elements of the largest tensor that is neither argument nor result."""
        return self.row.intermediate(self)

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def with_batch(self, size: int) -> Case:
        """Return the case with `size` as the first dimension of the tensors that have a batch dimension."""
        shapes = {name: (size, *s[1:]) if name in self.row.batched else s for name, s in self.shapes.items()}
        return replace(self, shapes=shapes)


Draw = Callable[[Case, Shape, torch.dtype, torch.Generator], Tensor]


def _normal(case: Case, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def matrix(case: Case, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw a matrix whose product with a normal x is about normal."""
    return (shape[-1] ** -0.5 * torch.randn(shape, generator=generator)).to(dtype)


@dataclass(frozen=True)
class Dropout:
    """The test of an operator's dropout: the mask is read off the operator and given to a reference."""

    mask: Callable[[Case], Tensor]
    candidates: Callable[[Case], Tensor]  # true where dropout decides
    reference: Callable[..., Any]  # takes the mask as `kept`


@dataclass(frozen=True)
class Operator:
    """An entry of the operator table: everything that the tests need to know of an operator."""

    name: str
    batched: tuple[str, ...]  # arguments whose first dimension holds independent problems
    cases: tuple[Case, ...]  # for arithmetic: every dtype, forward and backward
    small: tuple[Case, ...]  # for everything else
    drawn: st.SearchStrategy[Case]  # for strides and offsets; well conditioned for constant rows too
    large: tuple[Case, ...]  # real sizes, on GPUs only
    far: tuple[Case, ...]  # more than 2**31 elements
    configurations: dict[str, dict[str, Config]]  # forced by the names of launches, beside the tuning candidates
    valid: dict[str, Any]  # arguments that are accepted
    invalid: tuple[tuple[dict[str, Any], type[Exception], str], ...]  # a change of them, the error, and what it quotes
    results: tuple[str, ...] = ("result",)
    result_shape: Callable[[Case], Shape] = lambda case: next(iter(case.shapes.values()))
    intermediate: Callable[[Case], int] = lambda case: 0  # elements of the largest one
    draws: dict[str, Draw] = field(default_factory=dict)  # arguments that are not drawn as `_normal`
    dropout: Dropout | None = None
    differentiable: bool = True
    # size of terms that cancel in gradients, of arguments and upstream gradients
    cancelling: Callable[[dict[str, Any], dict[str, Tensor]], float] = lambda inputs, upstream: 0.0

    @property
    def uses(self) -> list[tuple[str, ...]]:
        """The results that a caller may use: all, or one of several."""
        return [self.results] + [(name,) for name in self.results if len(self.results) > 1]
