"""A case of an operator under test, and what the bench knows of the operator."""

from __future__ import annotations

import math
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
OPERATORS: dict[str, Operator] = {}  # by name; the table is in operators.py


@dataclass(frozen=True)
class Case:
    """One call of an operator: shapes of its tensor arguments by name (None is passed on), and the other arguments."""

    operator: str
    shapes: dict[str, tuple[int, ...] | None]
    options: dict[str, Any] = field(default_factory=dict)
    in_float32: tuple[str, ...] = ()  # arguments that stay in float32 when the others are in half precision
    in_half: tuple[str, ...] = ()  # the reverse: bfloat16 beside float32

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
        """The reference; where there is dropout, with the mask that the operator draws for this seed and shape."""
        if not self.has_dropout:
            return getattr(reference, self.operator)
        kept = self.row.dropout.mask(self)

        def with_mask(seed, **arguments):
            return self.row.dropout.reference(**arguments, kept=kept)

        return with_mask

    @property
    def has_dropout(self) -> bool:
        return self.options.get("dropout_p", 0.0) > 0.0

    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes in which this case is a case of its own."""
        if self.in_half:
            return (torch.float32,)
        return DTYPES[1:] if self.in_float32 else DTYPES

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
        """Random normal tensors; matrices are scaled so that products keep the size of their operands."""
        generator = torch.Generator().manual_seed(seed)
        return {name: self.draw(name, dtype, generator) for name in self.shapes}

    def draw(self, name: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
        shape = self.shapes[name]
        if shape is None:
            return None
        if name == "lengths":
            return torch.randint(0, self.shapes["k_cache"][2] + 1, shape, generator=generator).to(DEVICE)
        if name == "targets":
            return self._targets(shape, generator).to(DEVICE)
        if self.operator == "int8_linear" and name == "weight":
            return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)
        if name == "scale":  # float32 whatever the rest is in; products keep the size of x
            size = 0.01 * self.shapes["weight"][1] ** -0.5
            return (size * (0.5 + torch.rand(shape, generator=generator))).to(DEVICE)
        matrix = name.startswith("w_") or (self.operator == "linear_cross_entropy" and name == "weight")
        scale = shape[-1] ** -0.5 if matrix else 1.0
        own = torch.float32 if name in self.in_float32 else torch.bfloat16 if name in self.in_half else dtype
        return (scale * torch.randn(shape, generator=generator)).to(DEVICE, own)

    def _targets(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Classes, and about one in five that is left out."""
        classes = self.options.get("vocab_size") or self.shapes["weight"][0]
        targets = torch.randint(0, classes, shape, generator=generator)
        left_out = torch.rand(shape, generator=generator) < 0.2
        return targets.masked_fill(left_out, self.options.get("ignore_index", -100))

    def upstream(self, dtype: torch.dtype, used: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        """A random gradient for each result, or for those that are `used`."""
        if not self.row.differentiable:
            return {}
        shape = self.row.result_shape(self)
        generator = torch.Generator().manual_seed(1)
        drawn = {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name in self.row.results}
        return {name: gradient for name, gradient in drawn.items() if used is None or name in used}

    def largest_intermediate(self) -> int:
        """Elements of the largest tensor that is neither argument nor result: a hidden layer, or logits."""
        rows = math.prod(next(iter(self.shapes.values()))[:-1])
        columns = {"gelu_ffn": "w_up", "linear_cross_entropy": "weight"}.get(self.operator)
        return 0 if columns is None else rows * self.shapes[columns][0]

    def with_options(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    def with_batch(self, size: int) -> Case:
        """Other rows: `size` in the first dimension of the tensors that have it."""
        shapes = {name: (size, *s[1:]) if name in self.row.batched else s for name, s in self.shapes.items()}
        return replace(self, shapes=shapes)


@dataclass(frozen=True)
class Dropout:
    """How dropout is tested: its mask is read off the operator itself and given to a reference that takes one."""

    mask: Callable[[Case], Tensor]
    candidates: Callable[[Case], Tensor]  # true where dropout decides
    reference: Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """All that the bench needs to know of an operator."""

    name: str
    batched: tuple[str, ...]  # arguments whose first dimension is cut into independent problems
    cases: tuple[Case, ...]  # arithmetic: every dtype, forward and backward
    small: tuple[Case, ...]  # for tests whose subject is not the arithmetic
    drawn: st.SearchStrategy[Case]  # sizes for tests of strides and offsets, well conditioned for constant rows too
    large: tuple[Case, ...]  # real sizes, for GPUs alone
    far: tuple[Case, ...]  # more than 2**31 elements
    configurations: dict[str, dict[str, Config]]  # forced upon launches by name, beside the candidates of tuning
    results: tuple[str, ...] = ("result",)
    result_shape: Callable[[Case], tuple[int, ...]] = lambda case: next(iter(case.shapes.values()))
    dropout: Dropout | None = None
    differentiable: bool = True

    @property
    def uses(self) -> list[tuple[str, ...]]:
        """The results that a caller may use: all, or one alone."""
        alone = [(name,) for name in self.results]
        return [self.results, *alone] if len(alone) > 1 else alone
