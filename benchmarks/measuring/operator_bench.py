"""The bench of one operator: its passes, checked against the reference in a wider dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.bench import TOLERANCES, Bench, dtype_name, relative_error, require_close
from benchmarks.measuring.operator_cases import FORWARD, Function, Provider, Result, as_tuple
from benchmarks.measuring.timing import Call, Times, kernel_times, peak_bytes


class OperatorBench(Bench):
    """Times of an operator's passes: CUDA events on a GPU, the wall clock on a CPU."""

    def set_up(self) -> None:
        operator, self.source, self.dtype = self.case.operator, self.case, self.case.dtype
        self.inputs = self.case.inputs(self.device)
        self.dy = self.case.upstream(self.inputs)
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        inputs = [operator.compared(tensor.detach()).to(wide).requires_grad_() for tensor in self.inputs]
        dy = [operator.compared(gradient).to(wide) for gradient in self.dy]
        self.expected = run(self.case.reference, inputs, dy, operator.differentiable)

    def check(self, provider: Provider, built: Function) -> float:
        """Return the largest relative error of the results and, if the provider has a backward, of the gradients."""
        found = run(built, self.inputs, self.dy, gradients=provider.modes != FORWARD)
        names = [*("the result" for _ in self.dy), *(f"the gradient of {name}" for name in self.case.shapes)]
        worst = 0.0
        for name, result, expected in zip(names, found, self.expected, strict=False):
            error = relative_error(self.case.operator.compared(result), expected)
            require_close(name, error, TOLERANCES[self.dtype])
            worst = max(worst, error)
        return worst

    def prepare(self, name: str, mode: str) -> tuple[dict[str, Call], int | None]:
        call = self._call(self.ready[name], mode)
        call.run(call.prepare())  # allocations of a first call are not the operator's own
        return {"whole": call}, peak_bytes(call, self.device)

    def time(self, calls: dict[tuple[str, str], Call]) -> dict[tuple[str, str], Times]:
        return kernel_times(calls, self.device)

    def metrics(self, name: str, mode: str, seconds: dict[str, float]) -> dict[str, Any]:
        """Compute rates, and their share of the copy and matrix product rates that this run measured."""
        cost, whole = self.case.cost(mode), seconds["whole"]
        copy = self.limits["copy_bytes_per_second"]
        matrix = self.limits["matrix_flops_per_second"].get(dtype_name(self.dtype))
        return {
            "flops": cost.flops,
            "bytes": cost.bytes,
            "flops_per_second": cost.flops / whole,
            "bytes_per_second": cost.bytes / whole,
            "copy_share": cost.bytes / whole / copy,
            "matrix_share": None if matrix is None else cost.flops / whole / matrix,
            "roofline_seconds": None if matrix is None else cost.seconds(matrix, copy),
        }

    def close(self) -> None:
        self.inputs, self.dy, self.expected = [], [], []
        super().close()

    def _call(self, function: Function, mode: str) -> Call:
        inputs, dy = self.inputs, self.dy

        def forward(_: None) -> Result:
            with torch.no_grad():
                return function(*inputs)

        if mode == "forward":
            return Call(forward)
        if mode == "backward":
            return Call(lambda y: input_gradients(y, inputs, dy), prepare=lambda: function(*inputs))
        return Call(lambda _: input_gradients(function(*inputs), inputs, dy))


def run(function: Function, inputs: list[Tensor], dy: list[Tensor], gradients: bool) -> list[Tensor]:
    """Compute the results and, on request, the input gradients."""
    if not gradients:
        with torch.no_grad():
            return list(as_tuple(function(*inputs)))
    y = as_tuple(function(*inputs))
    return [*(output.detach() for output in y), *input_gradients(y, inputs, dy)]


def input_gradients(result: Result, inputs: list[Tensor], dy: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute the input gradients; `dy` is cast to the dtype of the results, which are wider for losses."""
    y = as_tuple(result)
    return torch.autograd.grad(y, inputs, [d.to(output.dtype) for output, d in zip(y, dy, strict=True)])
