"""Launch configurations: looked up where they were measured, by a rule elsewhere, measured anew on request.

What a kernel is launched with (block shape, warps, pipeline stages) is decided once for each device and problem, by
the first of these that knows: what was measured on this machine, kept in a file of the cache folder; the table of the
architecture that comes with the package; the operator's rule, which lists its choices with the likeliest first. Nothing
is measured unless it is asked for: inside `autotune()`, which `kernels.warmup(..., autotune=True)` uses, or everywhere
with the environment variable GPTFAST_AUTOTUNE=1. The cache folder is GPTFAST_CACHE, else gptfast in XDG_CACHE_HOME or
~/.cache.

State is global, not bound to a context: gradients are computed in threads of their own.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

Options = Mapping[str, Any]  # of a launch, by the names of the kernel's constants and of Triton's compiler options
Told = Callable[[str, str, list[tuple[Options, float]]], None]
Result = TypeVar("Result")

TABLES = Path(__file__).parent / "launches"
TUNABLES: dict[str, Tunable] = {}

_told: Told = lambda launch, problem, times: None  # noqa: E731
_requested = os.environ.get("GPTFAST_AUTOTUNE", "0") not in ("", "0")
_forced: Mapping[str, Options] = {}
_candidate: int | None = None
_assumed_architecture: str | None = None


class Tunable:
    """A launch whose configuration is a choice.

    Args:
        name: of the launch, in tables and cache files.
        choices: the configurations for an architecture and a problem, the likeliest first: that one is taken where
            nobody has measured, all are tried by a measurement. A table's entry that is not among them is out of date.
    """

    def __init__(self, name: str, choices: Callable[..., list[Options]]) -> None:
        self.name = name
        self._choices = choices
        self._chosen: dict[tuple, Options] = {}
        TUNABLES[name] = self

    def candidates(self, device: torch.device, *problem: object) -> list[Options]:
        """The choices for a problem, each once."""
        choices = self._choices(architecture(device), *problem)
        return [options for index, options in enumerate(choices) if options not in choices[:index]]

    def launch(self, run: Callable[[Options], Result], device: torch.device, *problem: object) -> Result:
        """Call `run` with the configuration for a problem: sizes, dtypes and flags, whatever the choice depends on.

        `run` allocates and launches, and may be called several times where a measurement is asked for.
        """
        chosen = self._chosen.get((device, problem))
        return run(self._choose(run, device, problem) if chosen is None else chosen)

    def forget(self) -> None:
        """Decide anew at the next launch."""
        self._chosen.clear()

    def _choose(self, run: Callable[[Options], object], device: torch.device, problem: tuple) -> Options:
        if self.name in _forced:
            return _forced[self.name]
        candidates = self.candidates(device, *problem)
        if _candidate is not None:
            return candidates[min(_candidate, len(candidates) - 1)]
        measured = _measured(device).get(self.name, {}).get(_text(problem))
        if measured not in candidates:
            measured = None
            # measuring synchronises, which a capture does not survive
            if _requested and len(candidates) > 1 and device.type == "cuda":
                if torch.cuda.is_current_stream_capturing():
                    return candidates[0]
                with torch.cuda.device(device):
                    measured = _fastest(self.name, _text(problem), run, candidates)
                _keep(device, self.name, problem, measured)
        if measured is None:
            measured = _table(architecture(device)).get(self.name, {}).get(_text(problem))
        self._chosen[device, problem] = measured if measured in candidates else candidates[0]
        return self._chosen[device, problem]


@contextmanager
def _setting(name: str, value: object, forget_after: bool = True) -> Iterator[None]:
    """Give the global `name` this value for a while. Choices are made anew with it, and after it if `forget_after`."""
    before = globals()[name]
    globals()[name] = value
    _forget_all()
    try:
        yield
    finally:
        globals()[name] = before
        if forget_after:
            _forget_all()


def autotune() -> AbstractContextManager[None]:
    """Measure what was not measured before: each kernel's first launch for a problem tries every candidate.

    Outcomes are kept on disk and are found again by later processes. Inside a CUDA graph's capture nothing is measured.
    """
    return _setting("_requested", True, forget_after=False)  # what was measured stays chosen


def telling(told: Told) -> AbstractContextManager[None]:
    """Tell of each measurement: the launch, the problem, and each candidate with its milliseconds, infinite if it does
    not fit the GPU.
    """
    return _setting("_told", told, forget_after=False)


def forced(options: Mapping[str, Options]) -> AbstractContextManager[None]:
    """Launch with these configurations, by the names of the launches, whatever was measured."""
    return _setting("_forced", options)


def candidate(index: int) -> AbstractContextManager[None]:
    """Launch each kernel with the candidate of this index, or its last one: for tests of all configurations."""
    return _setting("_candidate", index)


def assumed(name: str) -> AbstractContextManager[None]:
    """Decide as on a GPU of the architecture `name`, such as "sm_90"."""
    return _setting("_assumed_architecture", name)


def _forget_all() -> None:
    for tunable in TUNABLES.values():
        tunable.forget()


def architecture(device: torch.device) -> str:
    """Such as "sm_90" or "gfx942"; "none" of a device that is no GPU."""
    if _assumed_architecture is not None:
        return _assumed_architecture
    return _architecture(device.index or 0) if device.type == "cuda" else "none"


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def _text(problem: tuple) -> str:
    return " ".join(str(value).removeprefix("torch.") for value in problem)


@functools.cache
def _table(architecture: str) -> dict[str, dict[str, Options]]:
    """What comes with the package for an architecture: by launch and problem. Empty where nobody has measured."""
    path = TABLES / f"{architecture}.json"
    return json.loads(path.read_text(encoding="utf-8"))["launches"] if path.exists() else {}


def cache_file(device: torch.device) -> Path:
    """Where measurements on this GPU with this Triton are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast")
    folder = Path(os.environ.get("GPTFAST_CACHE") or default)
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return folder / "launches" / f"{gpu}-triton-{triton.__version__}.json"


def _measured(device: torch.device) -> dict[str, dict[str, Options]]:
    """What was measured on this machine, by launch and problem."""
    return _read_cache(cache_file(device)) if device.type == "cuda" and _assumed_architecture is None else {}


def _read_cache(path: Path) -> dict[str, dict[str, Options]]:
    try:
        launches = dict(json.loads(path.read_text(encoding="utf-8"))["launches"])
        return {name: dict(problems) for name, problems in launches.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"the tuned launches in {path} cannot be read, going on without: {error}", stacklevel=2)
        return {}


def _fastest(name: str, problem: str, run: Callable[[Options], object], candidates: list[Options]) -> Options:
    """The candidate whose launches take the shortest median time, caches cold."""
    times = []
    for options in candidates:
        try:
            times.append(_milliseconds(functools.partial(run, options)))
        except OutOfResources:  # made for a larger chip
            times.append(float("inf"))
    _told(name, problem, list(zip(candidates, times, strict=True)))
    best = min(range(len(candidates)), key=times.__getitem__)
    if times[best] == float("inf"):
        raise RuntimeError(f"{name}: none of {len(candidates)} launch configurations fits this GPU")
    return candidates[best]


def _milliseconds(run: Callable[[], object]) -> float:
    return triton.testing.do_bench(run, warmup=5, rep=25, return_mode="median")


def _keep(device: torch.device, name: str, problem: tuple, options: Options) -> None:
    """Add to the cache file, which appears whole or not at all; what other processes added meanwhile stays."""
    path = cache_file(device)
    launches = _read_cache(path)
    launches.setdefault(name, {})[_text(problem)] = options
    content = {
        "device": torch.cuda.get_device_name(device),
        "architecture": architecture(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "launches": launches,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".partial", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"tuned launches cannot be kept in {path}: {error}", stacklevel=2)
