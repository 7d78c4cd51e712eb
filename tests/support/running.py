"""Forward and backward of an operator under test, and comparisons of their outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.support.cases import Case
from tests.support.oracle import assert_equal_to_oracle


@dataclass
class Outcome:
    """Results and gradients of one forward and backward, by name."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor | None]


def leaves(
    inputs: dict[str, Tensor | None], dtype: torch.dtype | None = None, differentiable: bool = True
) -> dict[str, Tensor | None]:
    """Return leaves on the same memory that require gradients if `differentiable`, or copies in another dtype."""
    return {
        name: tensor
        if tensor is None or not tensor.is_floating_point() or name == "scale"  # always float32
        else tensor.detach().to(dtype or tensor.dtype).requires_grad_(differentiable)
        for name, tensor in inputs.items()
    }


def call(function: Callable[..., Any], case: Case, inputs: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Return the results by name."""
    results = function(**inputs, **case.options)
    results = results if isinstance(results, tuple) else (results,)
    return dict(zip(case.row.results, results, strict=True))


def backward(results: dict[str, Tensor], upstream: dict[str, Tensor]) -> None:
    used = [results[name] for name in upstream]
    torch.autograd.backward(used, [dy.to(y.dtype) for y, dy in zip(used, upstream.values(), strict=True)])


def run(
    function: Callable[..., Any], case: Case, inputs: dict[str, Tensor | None], upstream: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Outcome:  # fmt: skip
    """Run the forward and, with upstream gradients, the backward. Casts every tensor to `dtype` if one is given."""
    own = leaves(inputs, dtype, case.row.differentiable)
    if dtype is not None and "dtype" in case.options:
        case = case.with_options(dtype=dtype)
    results = call(function, case, own)
    if upstream:
        backward(results, upstream)
    with_gradients = {n: t for n, t in own.items() if t is not None and t.is_floating_point()}
    gradients = {n: t.grad for n, t in with_gradients.items() if case.row.differentiable}
    return Outcome({name: y.detach() for name, y in results.items()}, gradients)


def assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    for kind in ("results", "gradients"):
        for name, tensor in getattr(expected, kind).items():
            other = getattr(actual, kind)[name]
            assert (tensor is None) == (other is None), f"{kind}: {name}"
            assert tensor is None or torch.equal(other, tensor), f"{kind}: {name}"


def assert_equal_to_reference(
    case: Case, inputs: dict[str, Tensor | None], upstream: dict[str, Tensor], outcome: Outcome | None = None,
    magnitude: float = 0.0,
) -> None:  # fmt: skip
    """Compare results and gradients of the operator, or those of `outcome`, with the reference by the oracle rule."""
    ours = outcome or run(case.kernel, case, inputs, upstream)
    theirs = run(case.reference, case, inputs, upstream)
    exact = run(case.reference, case, inputs, upstream, torch.float64)
    for name, oracle in exact.results.items():
        assert_equal_to_oracle(name, ours.results[name], theirs.results[name], oracle, magnitude)
    magnitude = max(magnitude, case.row.cancelling(inputs, upstream))
    for name, oracle in exact.gradients.items():
        gradient, same_dtype = ours.gradients[name], theirs.gradients[name]
        if oracle is None:  # the used results do not depend on this argument
            assert gradient is None or not gradient.any(), f"gradient of {name}: not zero"
        else:
            assert gradient is not None, f"gradient of {name}: missing"
            assert_equal_to_oracle(f"gradient of {name}", gradient, same_dtype, oracle, magnitude)
