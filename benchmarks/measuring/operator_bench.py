"""An entry of the operator table, its cases and its providers, and the bench that compares them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kernels
from benchmarks.cost_model.operators import Cost, Passes
from benchmarks.measuring.bench import TOLERANCES, Bench, UnavailableError, dtype_name, relative_error, require_close
from benchmarks.measuring.machine import default_device
from benchmarks.measuring.timing import Call, Times, kernel_times, peak_bytes
from kernels import reference, runtime

MODES = ("forward", "backward", "both")
FORWARD = ("forward",)  # the passes of an operator without gradients

Result = Tensor | tuple[Tensor, ...]
Function = Callable[..., Result]


@dataclass(frozen=True)
class Provider:
    """An implementation of an operator: `build(case)` returns a function of the case's tensors.

    `build` imports what it needs, and raises UnavailableError if the implementation cannot run here.
    """

    name: str
    build: Callable[[Case], Function]
    modes: tuple[str, ...] = MODES
    compiles: bool = False


@dataclass(frozen=True)
class Sizes:
    """Sizes of one case in the order of `Operator.dims`. `compiled=False` leaves out the providers that compile."""

    values: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = True


@dataclass(frozen=True)
class Operator:
    """An entry of the operator table. The values of `dims` are the arguments of `shapes` and `cost`.

    Args:
        sizes: the cases of the benchmarks, the most informative first: a short time budget drops the last ones.
        accuracy_sizes: sizes for `benchmarks.accuracy` on a GPU, and in Triton's interpreter.
        compared: the part of a result that is checked, where the reference would not fit into memory. It must depend
            on the same part of the inputs only.
    """

    name: str  # the function's name in `kernels` and `kernels.reference`
    dims: tuple[str, ...]  # names of the sizes
    shapes: Callable[..., dict[str, tuple[int, ...]]]  # of the tensors; "w_" names are weights of matrix products
    cost: Callable[..., Passes]  # its last argument is the itemsize of the dtype
    sizes: tuple[Sizes, ...]
    accuracy_sizes: tuple[tuple[int, ...], tuple[int, ...]] | None
    peers: tuple[Provider, ...] = ()  # implementations besides Triton and eager PyTorch
    modes: tuple[str, ...] = MODES  # the passes that are timed
    bind: Callable[[Function, Case], Function] = lambda function, case: function  # adds arguments besides the tensors
    kernel: Callable[[Case], Function] | None = None  # else the function in `kernels`
    reference: Function | None = None  # else the function in `kernels.reference`
    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor  # makes an argument's strides from a contiguous tensor
    compared: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def case(self, *values: int, dtype: torch.dtype = torch.bfloat16, compiled: bool = True) -> Case:
        return Case(self, Sizes(values, dtype, compiled))

    @property
    def cases(self) -> list[Case]:
        return [Case(self, sizes) for sizes in self.sizes]

    @property
    def differentiable(self) -> bool:
        return self.modes != FORWARD

    @property
    def providers(self) -> dict[str, Provider]:
        """Triton, eager PyTorch, its compiled form and the peers, by name."""
        own = (
            Provider("triton", triton),
            Provider("eager", lambda case: case.reference),
            Provider("eager compiled", _compiled, compiles=True),
        )
        return {
            provider.name: replace(provider, modes=tuple(mode for mode in self.modes if mode in provider.modes))
            for provider in (*own, *self.peers)
        }


@dataclass(frozen=True)
class Case:
    """An operator with sizes and a dtype."""

    operator: Operator
    sizes: Sizes

    @property
    def suite(self) -> str:
        return self.operator.name

    @property
    def dtype(self) -> torch.dtype:
        return self.sizes.dtype

    @property
    def dims(self) -> dict[str, int]:
        return dict(zip(self.operator.dims, self.sizes.values, strict=True))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.operator.shapes(*self.sizes.values)

    @property
    def reference(self) -> Function:
        """The eager PyTorch function that defines the result."""
        return self.operator.bind(self.operator.reference or getattr(reference, self.suite), self)

    def __str__(self) -> str:
        return " ".join([dtype_name(self.dtype), *(f"{name}={size}" for name, size in self.dims.items())])

    def measurements(self) -> list[tuple[str, str]]:
        """The mode and the provider of each measurement."""
        providers = [one for one in self.operator.providers.values() if self.sizes.compiled or not one.compiles]
        return [(mode, one.name) for mode in self.operator.modes for one in providers if mode in one.modes]

    def cost(self, mode: str) -> Cost:
        passes = self.operator.cost(*self.sizes.values, self.dtype.itemsize)
        return {"forward": passes.inference, "backward": passes.backward, "both": passes.training}[mode]

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Draw normal tensors that require gradients; weights are scaled so that products have unit variance."""
        generator = torch.Generator(device).manual_seed(0)
        tensors = []
        for name, shape in self.shapes.items():
            scale = shape[-1] ** -0.5 if name.startswith("w_") else 1.0
            drawn = scale * torch.randn(shape, generator=generator, device=device)
            tensors.append(self.operator.layout(drawn.to(self.dtype)).requires_grad_())
        return tensors

    def upstream(self, inputs: list[Tensor]) -> list[Tensor]:
        """Draw a normal gradient for each result."""
        device = inputs[0].device
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            outputs = _as_tuple(self.reference(*(tensor.to("meta") for tensor in inputs)))
        return [torch.randn(output.shape, generator=generator, device=device).to(self.dtype) for output in outputs]


def triton(case: Case) -> Function:
    """Build the Triton implementation."""
    reason = runtime.unsupported_reason(default_device())
    if reason is not None:
        raise UnavailableError(reason)
    build = case.operator.kernel
    return case.operator.bind(build(case) if build else getattr(kernels, case.suite), case)


def _compiled(case: Case) -> Function:
    return torch.compile(case.reference, fullgraph=True, dynamic=False)


class OperatorBench(Bench):
    """Times of an operator's passes, by CUDA events or a CPU's wall clock, checked against the reference.

    The reference is computed in float32, for float32 results in float64.
    """

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
        function, inputs, dy = self.ready[name], self.inputs, self.dy
        if mode == "forward":
            call = Call(torch.no_grad()(lambda _: function(*inputs)))
        elif mode == "backward":
            call = Call(lambda y: _input_gradients(y, inputs, dy), prepare=lambda: function(*inputs))
        else:
            call = Call(lambda _: _input_gradients(function(*inputs), inputs, dy))
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


def run(function: Function, inputs: list[Tensor], dy: list[Tensor], gradients: bool) -> list[Tensor]:
    """Compute the results and, on request, the input gradients."""
    with torch.set_grad_enabled(gradients):
        y = _as_tuple(function(*inputs))
    return [*(output.detach() for output in y), *(_input_gradients(y, inputs, dy) if gradients else ())]


def _input_gradients(result: Result, inputs: list[Tensor], dy: list[Tensor]) -> tuple[Tensor, ...]:
    """Compute the input gradients; `dy` is cast to the dtype of the results, which are wider for losses."""
    y = _as_tuple(result)
    return torch.autograd.grad(y, inputs, [d.to(output.dtype) for output, d in zip(y, dy, strict=True)])


def _as_tuple(result: Result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
