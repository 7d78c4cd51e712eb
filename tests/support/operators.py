"""The table of operators under test: every row is run through every test of `tests/kernels/test_operators.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels import reference, runtime
from oracle import DEVICE


@dataclass(frozen=True)
class Case:
    """One call of an operator: shapes of its tensor arguments by name (None is passed on), and the other arguments."""

    operator: str
    shapes: dict[str, tuple[int, ...] | None]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shapes = "-".join("none" if s is None else "x".join(map(str, s)) for s in self.shapes.values())
        return "-".join([self.operator, shapes, *(str(value) for value in self.options.values())])

    @property
    def kernel(self) -> Callable[..., Tensor]:
        return getattr(kernels, self.operator)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return getattr(reference, self.operator)

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
        """Random normal tensors; matrices are scaled so that products keep the size of their operands."""
        generator = torch.Generator().manual_seed(seed)

        def draw(name: str, shape: tuple[int, ...] | None) -> Tensor | None:
            if shape is None:
                return None
            scale = shape[-1] ** -0.5 if name.startswith("w_") else 1.0
            return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)

        return {name: draw(name, shape) for name, shape in self.shapes.items()}


def layer_norm(*rows: int, width: int, bias: bool = True, **options: Any) -> Case:
    shapes = {"x": (*rows, width), "weight": (width,), "bias": (width,) if bias else None}
    return Case("layer_norm", shapes, options)


def gelu_ffn(*rows: int, width: int, hidden: int, biases: bool = True, **options: Any) -> Case:
    shapes = {
        "x": (*rows, width),
        "w_up": (hidden, width),
        "b_up": (hidden,) if biases else None,
        "w_down": (width, hidden),
        "b_down": (width,) if biases else None,
    }
    return Case("gelu_ffn", shapes, options)


def attention(batch: int, heads: int, queries: int, keys: int, head_size: int, **options: Any) -> Case:
    key_shape = (batch, heads, keys, head_size)
    return Case("causal_attention", {"q": (batch, heads, queries, head_size), "k": key_shape, "v": key_shape}, options)


CASES = [
    layer_norm(1, width=1),
    layer_norm(37, width=33),
    layer_norm(3, 5, width=768, eps=1e-3),
    layer_norm(130, width=64, bias=False),
    layer_norm(2, width=4099),
    # more rows than the programs of the backward take in one go, 32 each at this width
    layer_norm(32 * runtime.program_count(DEVICE, per_processor=8) + 5, width=64),
    layer_norm(0, width=16),
    gelu_ffn(1, width=1, hidden=1),
    gelu_ffn(37, width=33, hidden=65),
    gelu_ffn(37, width=33, hidden=65, activation="gelu"),
    gelu_ffn(2, 19, width=16, hidden=48, activation="relu"),
    gelu_ffn(200, width=80, hidden=144, biases=False),
    gelu_ffn(0, width=16, hidden=32),
    attention(1, 1, 1, 1, 16),
    attention(2, 3, 77, 77, 20),
    attention(1, 2, 128, 128, 64),
    attention(1, 2, 129, 129, 64, scale=0.3),
    attention(1, 1, 1, 40, 32),
    attention(2, 2, 33, 131, 8),
    attention(1, 1, 70, 70, 128),
    attention(1, 1, 40, 45, 256),
    attention(1, 2, 9, 9, 1),
    attention(0, 2, 8, 8, 16),
    attention(1, 1, 0, 5, 16),
]

# one small case per operator, for tests whose subject is not the arithmetic
SMALL = [
    layer_norm(2, 7, width=33),
    gelu_ffn(2, 7, width=33, hidden=65),
    attention(2, 3, 17, 21, 20),
]
