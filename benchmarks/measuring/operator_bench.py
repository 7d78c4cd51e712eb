"""One operator on one set of shapes, by several providers: built, checked against the reference, then timed in turn."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cost_model.operators import Cost, Passes
from benchmarks.measuring.timing import Call, Times, kernel_times, peak_bytes, percentiles

MODES = ("forward", "backward", "both")
# ours, and what defines correct: when these fail, something is broken; when a peer does, it is only missing
OWN = (
    "eager", "eager int8", "triton", "triton int8", "triton compiled", "triton captured", "triton compiled captured",
)  # fmt: skip

# ||result - reference|| / ||reference||: several times what rounding leaves, far below what a wrong mask, scale or
# missing block would. The tests hold the kernels to the stricter rule.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}

Result = Tensor | tuple[Tensor, ...]
Operator = Callable[..., Result]


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


class WrongResultError(Exception):
    """A provider's result is not the reference's."""


@dataclass(frozen=True)
class Case:
    """Shapes and dtype of one comparison.

    Args:
        suite: name of the operator.
        dims: the sizes that name it, in order.
        dtype: of all tensors.
        shapes: of the tensor arguments, by name and in order.
        passes: FLOPs and bytes.
        reference: the operator that defines correct.
        strided: makes an argument's layout from a contiguous tensor that `shapes` describes.
        without: providers that are left out: those that compile take longer than all the others together.
        part: the share of a result that is compared, for references that would not fit into memory whole; it must
            depend on nothing but the same share of the inputs.
    """

    suite: str
    dims: Mapping[str, int]
    dtype: torch.dtype
    shapes: Mapping[str, tuple[int, ...]]
    passes: Passes
    reference: Operator
    strided: Callable[[Tensor], Tensor] = lambda tensor: tensor
    without: tuple[str, ...] = ()
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.dtype_name} " + " ".join(f"{name}={size}" for name, size in self.dims.items())

    def cost(self, mode: str) -> Cost:
        return {"forward": self.passes.inference, "backward": self.passes.backward, "both": self.passes.training}[mode]

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Random normal tensors that require gradients; weights are scaled so that products keep their size."""
        generator = torch.Generator(device).manual_seed(0)
        tensors = []
        for name, shape in self.shapes.items():
            scale = shape[-1] ** -0.5 if name.startswith("w_") else 1.0
            drawn = scale * torch.randn(shape, generator=generator, device=device)
            tensors.append(self.strided(drawn.to(self.dtype)).requires_grad_())
        return tensors

    def upstream(self, inputs: list[Tensor]) -> list[Tensor]:
        """A random normal gradient for each result of these inputs."""
        device = inputs[0].device
        generator = torch.Generator(device).manual_seed(1)
        with torch.no_grad():
            outputs = results(self.reference(*(tensor.to("meta") for tensor in inputs)))
        return [torch.randn(output.shape, generator=generator, device=device).to(self.dtype) for output in outputs]


@dataclass(frozen=True)
class Provider:
    """An implementation of an operator: `build(case)` gives it, or raises `UnavailableError`."""

    name: str
    build: Callable[[Case], Operator]
    modes: tuple[str, ...] = MODES

    @property
    def differentiable(self) -> bool:
        """Whether it has gradients: the backward is a pass of its own, or one with the forward, as a loss's may be."""
        return any(mode != "forward" for mode in self.modes)


@dataclass
class Comparison:
    """Measures a case for `providers`; what cannot be measured says why and leaves the rest alone."""

    case: Case
    providers: list[Provider]
    device: torch.device
    limits: Mapping[str, Any]
    failures: dict[str, Exception] = field(default_factory=dict)  # by provider
    _ready: dict[str, Operator] = field(default_factory=dict)
    _errors: dict[str, float] = field(default_factory=dict)
    _measured: dict[str, dict[str, tuple[Times, int | None] | Exception]] = field(default_factory=dict)  # by mode

    def __post_init__(self) -> None:
        self._inputs = self.case.inputs(self.device)
        self._dy = self.case.upstream(self._inputs)
        truth = self._truth()
        for provider in self.providers:
            with noting(self.failures, provider.name):
                operator = provider.build(self.case)
                self._errors[provider.name] = self._check(operator, truth, provider.differentiable)
                self._ready[provider.name] = operator

    def row(self, name: str, mode: str) -> tuple[Times, dict[str, Any]]:
        """The times of one provider, and the row of the results.

        Raises:
            UnavailableError: it has no such pass, or cannot run here, memory included.
            WrongResultError: its result is wrong, so that its speed means nothing.
            Exception: what else broke it.
        """
        self._require(name, mode)
        if mode not in self._measured:
            self._measured[mode] = self._measure(mode)
        measured = self._measured[mode][name]
        if isinstance(measured, Exception):
            raise measured
        times, memory = measured
        seconds = percentiles(times.device)
        return times, {
            "suite": self.case.suite,
            "case": str(self.case),
            "mode": mode,
            "provider": name,
            "dtype": self.case.dtype_name,
            "dims": dict(self.case.dims),
            "seconds": seconds,
            "host_seconds": None if times.host is None else percentiles(times.host),
            "error": self._errors[name],
            "peak_bytes": memory,
            **rates(self.case.cost(mode), seconds["median"], self.case.dtype_name, self.limits),
        }

    def call(self, name: str, mode: str) -> Call:
        """One provider's pass, to be called as it is timed. Raises what `row` raises."""
        self._require(name, mode)
        return self._call(self._ready[name], mode)

    def _require(self, name: str, mode: str) -> None:
        if mode not in next(provider.modes for provider in self.providers if provider.name == name):
            raise UnavailableError(f"{name} has no {mode} pass")
        if name in self.failures:
            raise self.failures[name]

    def close(self) -> None:
        """Give the memory back."""
        self._inputs, self._ready, self._dy = [], {}, []
        forget(self.device)

    def _measure(self, mode: str) -> dict[str, tuple[Times, int | None] | Exception]:
        calls, memory = {}, {}
        failures: dict[str, Exception] = {}
        for provider in self.providers:
            name = provider.name
            if mode in provider.modes and name not in self.failures:
                with noting(failures, name):
                    call = self._call(self._ready[name], mode)
                    call.run(call.prepare())  # what a first call allocates for good is not the operator's need
                    memory[name] = peak_bytes(call, self.device)
                    calls[name] = call
        times = kernel_times(calls, self.device) if calls else {}
        return failures | {name: (times[name], memory[name]) for name in calls}

    def _call(self, operator: Operator, mode: str) -> Call:
        inputs, dy = self._inputs, self._dy

        def forward(_: None) -> Result:
            with torch.no_grad():
                return operator(*inputs)

        def backward(y: Result) -> tuple[Tensor, ...]:
            return input_gradients(y, inputs, dy)

        def both(_: None) -> tuple[Tensor, ...]:
            return input_gradients(operator(*inputs), inputs, dy)

        if mode == "backward":
            return Call(backward, prepare=lambda: operator(*inputs))
        return Call(forward if mode == "forward" else both)

    def _truth(self) -> list[Tensor]:
        """The reference's results in a wider dtype, of the part that is compared."""
        part = self.case.part
        wider = torch.float64 if self.case.dtype == torch.float32 else torch.float32
        inputs = [part(tensor.detach()).to(wider).requires_grad_() for tensor in self._inputs]
        return run(self.case.reference, inputs, [part(dy).to(wider) for dy in self._dy], gradients=True)

    def _check(self, operator: Operator, truth: list[Tensor], gradients: bool) -> float:
        """The largest relative error among result and gradients."""
        found = run(operator, self._inputs, self._dy, gradients)
        names = [*("the result" for _ in self._dy), *(f"the gradient of {name}" for name in self.case.shapes)]
        worst = 0.0
        # the second list is longer where a provider has no gradients
        for name, result, expected in zip(names, found, truth, strict=False):
            error = relative_error(self.case.part(result), expected)
            require_close(f"{name} is wrong", error, self.case.dtype)
            worst = max(worst, error)
        return worst


def results(result: Result) -> tuple[Tensor, ...]:
    """An operator's results, be it one or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def run(operator: Operator, inputs: list[Tensor], dy: list[Tensor], gradients: bool) -> list[Tensor]:
    """Results and, if asked for, gradients."""
    if not gradients:
        with torch.no_grad():
            return list(results(operator(*inputs)))
    y = results(operator(*inputs))
    return [*(output.detach() for output in y), *input_gradients(y, inputs, dy)]


def input_gradients(result: Result, inputs: list[Tensor], dy: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the inputs, from those of the results, which may be in a wider dtype than the case: losses are."""
    y = results(result)
    return torch.autograd.grad(y, inputs, [d.to(output.dtype) for output, d in zip(y, dy, strict=True)])


@contextmanager
def noting(failures: dict[str, Exception], provider: str) -> Iterator[None]:
    """Note what a provider raises, so that the others go on."""
    try:
        yield
    except Exception as error:
        # its frames would keep memory, and graphs whose streams no CUDA graph of the same weights could wait for
        traceback.clear_frames(error.__traceback__)
        failures[provider] = classify(provider, error)


def classify(provider: str, error: Exception) -> Exception:
    """What a failure means: out of memory and a peer that does not work are reasons, the rest stays an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return UnavailableError(f"out of memory: {first_line(error)}")
    if isinstance(error, (UnavailableError, WrongResultError)) or provider in OWN:
        return error
    return UnavailableError(f"{type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """The first line of its message, within reason."""
    line = str(error).strip().splitlines()
    return line[0][:200] if line else ""


def relative_error(result: Tensor, expected: Tensor) -> float:
    """||result - expected|| / ||expected|| in the dtype of `expected`; nan where a result is."""
    return ((result.to(expected.dtype) - expected).norm() / expected.norm()).item()


def require_close(complaint: str, error: float, dtype: torch.dtype) -> None:
    """Raise WrongResultError, beginning with `complaint`, if a relative error is beyond what `dtype` may have."""
    if not error <= TOLERANCES[dtype]:
        raise WrongResultError(f"{complaint}: relative error {error:.2e}, accepted {TOLERANCES[dtype]:.0e}")


def forget(device: torch.device) -> None:
    """Free what is no longer used, and compiled code: the compiler keeps eight versions of a function at most."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def rates(cost: Cost, seconds: float, dtype: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    """What was done per second, and its share of what the same run found the machine to be able to."""
    copy, matrix = limits["copy_bytes_per_second"], limits["matrix_flops_per_second"].get(dtype)
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "flops_per_second": cost.flops / seconds,
        "bytes_per_second": cost.bytes / seconds,
        "copy_share": cost.bytes / seconds / copy,
        "matrix_share": None if matrix is None else cost.flops / seconds / matrix,
        "roofline_seconds": None if matrix is None else cost.seconds(matrix, copy),
    }
