"""Base of the benches, which compare the providers of one case: build, check against the reference, time in turns."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.timing import Call, Times, percentiles

# a failure of these is an error of this project; a peer that fails, the compiler included, is skipped with its reason
OWN = (
    "eager", "eager int8", "cpu", "cpu int8",
    "triton", "triton int8", "triton compiled", "triton captured", "triton compiled captured",
)  # fmt: skip

# accepted ||result - reference|| / ||reference||: several times the rounding error, far below the effect of a wrong
# mask, scale or missing block. The tests hold the kernels to a stricter rule.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class UnavailableError(ValueError):
    """A provider cannot run here; the message is the reason."""


class WrongResultError(RuntimeError):
    """The result of a provider differs from the reference."""


class Bench(ABC):
    """Measurements of one case. A provider that fails keeps its exception and leaves the others alone.

    A case has `suite`, `dims` and a name as `str(case)`; a provider has `name`, `modes` and `build`. `limits` are the
    copy and matrix product rates of `machine.measure_limits`.
    """

    dtype: torch.dtype
    source: Any  # the argument of a provider's `build`

    def __init__(self, case: Any, providers: Iterable[Any], device: torch.device, limits: Mapping[str, Any]) -> None:
        self.case, self.device, self.limits = case, device, limits
        self.providers = {provider.name: provider for provider in providers}
        self.failures: dict[str, Exception] = {}
        self.errors: dict[str, float] = {}
        self.ready: dict[str, Any] = {}
        # by mode and provider: the times of each part and the peak memory, or the failure
        self._measured: dict[str, dict[str, tuple[dict[str, Times], int | None] | Exception]] = {}
        self.set_up()
        for name, provider in self.providers.items():
            with record_failure(self.failures, name):
                built = provider.build(self.source)
                self.errors[name] = self.check(provider, built)
                self.ready[name] = built

    @abstractmethod
    def set_up(self) -> None:
        """Set `dtype` and `source`, and compute the expected result."""

    @abstractmethod
    def check(self, provider: Any, built: Any) -> float:
        """Return the relative error of a provider; raise WrongResultError if it is too large."""

    @abstractmethod
    def prepare(self, name: str, mode: str) -> tuple[dict[str, Call], int | None]:
        """Return the calls to time by part, "whole" among them, and the peak memory in bytes, None on a CPU."""

    @abstractmethod
    def time(self, calls: dict[tuple[str, str], Call]) -> dict[tuple[str, str], Times]:
        """Time the calls of all providers in turns."""

    @abstractmethod
    def metrics(self, name: str, mode: str, seconds: dict[str, float]) -> dict[str, Any]:
        """Compute the other fields of the row from the median seconds by part."""

    def row(self, name: str, mode: str) -> tuple[Times, dict[str, Any]]:
        """Measure a mode on its first request, and return one provider's times and row of the results.

        Raises:
            UnavailableError: the provider lacks this pass, or cannot run here, for memory or another reason.
            WrongResultError: its result is wrong, so its speed is meaningless.
            Exception: any other failure of the provider.
        """
        self._require(name, mode)
        if mode not in self._measured:
            self._measured[mode] = self._measure(mode)
        measured = self._measured[mode][name]
        if isinstance(measured, Exception):
            raise measured
        times, peak = measured
        whole = times["whole"]
        return whole, {
            "suite": self.case.suite,
            "case": str(self.case),
            "mode": mode,
            "provider": name,
            "dtype": dtype_name(self.dtype),
            "dims": dict(self.case.dims),
            "seconds": percentiles(whole.device),
            "host_seconds": None if whole.host is None else percentiles(whole.host),
            "error": self.errors[name],
            "peak_bytes": peak,
            **self.metrics(name, mode, {part: percentiles(one.device)["median"] for part, one in times.items()}),
        }

    def call(self, name: str, mode: str) -> Call:
        """Return one provider's pass as it is timed. Raises what `row` raises."""
        self._require(name, mode)
        return self.prepare(name, mode)[0]["whole"]

    def close(self) -> None:
        """Free memory and compiled code: the compiler keeps at most eight versions of a function."""
        self.ready.clear()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _require(self, name: str, mode: str) -> None:
        if mode not in self.providers[name].modes:
            raise UnavailableError(f"{name} has no {mode} pass")
        if name in self.failures:
            raise self.failures[name]

    def _measure(self, mode: str) -> dict[str, tuple[dict[str, Times], int | None] | Exception]:
        failures: dict[str, Exception] = {}
        prepared: dict[str, tuple[dict[str, Call], int | None]] = {}
        for name in self.ready:
            if mode in self.providers[name].modes:
                with record_failure(failures, name):
                    prepared[name] = self.prepare(name, mode)
        calls = {(name, part): call for name, (parts, _) in prepared.items() for part, call in parts.items()}
        times = self.time(calls) if calls else {}
        return failures | {
            name: ({part: times[name, part] for part in parts}, peak) for name, (parts, peak) in prepared.items()
        }


@contextmanager
def record_failure(failures: dict[str, Exception], provider: str) -> Iterator[None]:
    """Record what a provider raises, so that the other providers are still measured.

    An out-of-memory error and any failure of a peer become an UnavailableError with the reason.
    """
    try:
        yield
    except Exception as error:
        # frames keep tensors alive, and CUDA graphs whose streams block other graphs of the same weights
        traceback.clear_frames(error.__traceback__)
        if isinstance(error, torch.OutOfMemoryError):
            failures[provider] = UnavailableError(f"out of memory: {first_line(error)}")
        elif isinstance(error, (UnavailableError, WrongResultError)) or provider in OWN:
            failures[provider] = error
        else:
            failures[provider] = UnavailableError(f"{type(error).__name__}: {first_line(error)}")


def first_line(error: BaseException) -> str:
    """Return the first line of the message, at most 200 characters."""
    return str(error).strip().partition("\n")[0][:200]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Compute ||result - expected|| / ||expected|| in the dtype of `expected`; NaN if the result has NaN."""
    return ((result.to(expected.dtype) - expected).norm() / expected.norm()).item()


def require_close(what: str, error: float, tolerance: float) -> None:
    """Raise WrongResultError if a relative error is NaN or exceeds the tolerance."""
    if not error <= tolerance:
        raise WrongResultError(f"{what} is wrong: relative error {error:.2e}, accepted {tolerance:.0e}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name in results, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
