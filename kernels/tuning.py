"""Launch configurations: measured, from a table of the architecture, or by the operator's rule.

A configuration holds the block shape, warps and pipeline stages of a launch. It is chosen once for each device and key
(sizes, dtypes, flags), from the first of these that has it:

1. what was measured on this machine, kept in a file of the cache folder,
2. the table of the architecture that comes with the package,
3. the operator's rule, which lists its configurations with the likeliest first.

Measurements are made inside `autotune()`, which `kernels.warmup(..., autotune=True)` uses, or everywhere with the
environment variable GPTFAST_AUTOTUNE=1. The cache folder is GPTFAST_CACHE, else gptfast in XDG_CACHE_HOME or ~/.cache.

The state is global, not bound to a context: autograd computes gradients in threads of its own.
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

Config = Mapping[str, Any]  # by the names of the kernel's constants and of Triton's compiler options
OnMeasured = Callable[[str, str, list[tuple[Config, float]]], None]
Result = TypeVar("Result")

TABLES = Path(__file__).parent / "launches"
TUNABLES: dict[str, Tunable] = {}

_on_measured: OnMeasured = lambda launch, key, times: None  # noqa: E731
_requested = os.environ.get("GPTFAST_AUTOTUNE", "0") not in ("", "0")
_forced: Mapping[str, Config] = {}
_candidate: int | None = None
_assumed_architecture: str | None = None


class Tunable:
    """A launch with a choice of configurations.

    Args:
        name: the launch's name in tables and cache files.
        configs: returns the configurations for an architecture and a key, the likeliest first. The first is the
            default, and a measurement tries all. A table's entry that is not among them is out of date and ignored.
    """

    def __init__(self, name: str, configs: Callable[..., list[Config]]) -> None:
        self.name = name
        self._configs = configs
        self._chosen: dict[tuple, Config] = {}
        TUNABLES[name] = self

    def candidates(self, device: torch.device, *key: object) -> list[Config]:
        """Return the configurations for a key, each once."""
        configs = self._configs(architecture(device), *key)
        return [config for index, config in enumerate(configs) if config not in configs[:index]]

    def launch(self, run: Callable[[Config], Result], device: torch.device, *key: object) -> Result:
        """Call `run` with the configuration for a key: the sizes, dtypes and flags that the choice depends on.

        `run` allocates and launches. A measurement calls it several times.
        """
        chosen = self._chosen.get((device, key))
        return run(self._choose(run, device, key) if chosen is None else chosen)

    def clear(self) -> None:
        """Forget the choices: the next launch chooses again."""
        self._chosen.clear()

    def _choose(self, run: Callable[[Config], object], device: torch.device, key: tuple) -> Config:
        if self.name in _forced:
            return _forced[self.name]
        candidates = self.candidates(device, *key)
        if _candidate is not None:
            return candidates[min(_candidate, len(candidates) - 1)]
        cached = device.type == "cuda" and _assumed_architecture is None
        measured = _read_cache(cache_file(device)).get(self.name, {}).get(_text(key)) if cached else None
        if measured not in candidates:
            measured = None
            # a measurement synchronises, which would invalidate a capture
            if _requested and len(candidates) > 1 and device.type == "cuda":
                if torch.cuda.is_current_stream_capturing():
                    return candidates[0]
                with torch.cuda.device(device):
                    measured = _fastest(self.name, _text(key), run, candidates)
                _save(device, self.name, key, measured)
        if measured is None:
            measured = _table(architecture(device)).get(self.name, {}).get(_text(key))
        self._chosen[device, key] = measured if measured in candidates else candidates[0]
        return self._chosen[device, key]


@contextmanager
def _override(name: str, value: object, clear_after: bool = True) -> Iterator[None]:
    """Set the global `name` inside the context. Choices are cleared on entry, and on exit if `clear_after`."""
    before = globals()[name]
    globals()[name] = value
    _clear_all()
    try:
        yield
    finally:
        globals()[name] = before
        if clear_after:
            _clear_all()


def autotune() -> AbstractContextManager[None]:
    """Measure every launch without a measurement: its first call for a key tries all candidates.

    Measurements are saved on disk for later processes. Nothing is measured inside a CUDA graph's capture.
    """
    return _override("_requested", True, clear_after=False)


def on_measured(callback: OnMeasured) -> AbstractContextManager[None]:
    """Call `callback` after each measurement with the launch, the key, and each candidate's milliseconds.

    Milliseconds are infinite for a candidate that does not fit the GPU.
    """
    return _override("_on_measured", callback, clear_after=False)


def forced(configs: Mapping[str, Config]) -> AbstractContextManager[None]:
    """Launch with these configurations, by the names of the launches, before all others."""
    return _override("_forced", configs)


def candidate(index: int) -> AbstractContextManager[None]:
    """Launch each kernel with the candidate of this index, or its last one: for tests of all configurations."""
    return _override("_candidate", index)


def assume_architecture(name: str) -> AbstractContextManager[None]:
    """Choose as on a GPU of the architecture `name`, such as "sm_90"."""
    return _override("_assumed_architecture", name)


def _clear_all() -> None:
    for tunable in TUNABLES.values():
        tunable.clear()


def architecture(device: torch.device) -> str:
    """Return a name such as "sm_90" or "gfx942"; "none" for a device other than a GPU."""
    if _assumed_architecture is not None:
        return _assumed_architecture
    return _architecture(device.index or 0) if device.type == "cuda" else "none"


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"


def _text(key: tuple) -> str:
    return " ".join(str(value).removeprefix("torch.") for value in key)


@functools.cache
def _table(architecture: str) -> dict[str, dict[str, Config]]:
    """Return the package's table for an architecture, by launch and key; empty for an unmeasured one."""
    path = TABLES / f"{architecture}.json"
    return json.loads(path.read_text(encoding="utf-8"))["launches"] if path.exists() else {}


def cache_file(device: torch.device) -> Path:
    """Return the file of measurements on this GPU with this version of Triton."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast")
    folder = Path(os.environ.get("GPTFAST_CACHE") or default)
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return folder / "launches" / f"{gpu}-triton-{triton.__version__}.json"


def _read_cache(path: Path) -> dict[str, dict[str, Config]]:
    """Return the measurements on this machine, by launch and key."""
    try:
        launches = dict(json.loads(path.read_text(encoding="utf-8"))["launches"])
        return {name: dict(by_key) for name, by_key in launches.items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"cannot read the tuned launches in {path}, so they are not used: {error}", stacklevel=2)
        return {}


def _fastest(name: str, key: str, run: Callable[[Config], object], candidates: list[Config]) -> Config:
    """Return the candidate whose launches take the shortest median time, with cold caches."""
    times = []
    for config in candidates:
        try:
            launch = functools.partial(run, config)
            times.append(triton.testing.do_bench(launch, warmup=5, rep=25, return_mode="median"))
        except OutOfResources:  # made for a larger GPU
            times.append(float("inf"))
    _on_measured(name, key, list(zip(candidates, times, strict=True)))
    best = min(range(len(candidates)), key=times.__getitem__)
    if times[best] == float("inf"):
        raise RuntimeError(f"{name}: none of {len(candidates)} launch configurations fits this GPU")
    return candidates[best]


def _save(device: torch.device, name: str, key: tuple, config: Config) -> None:
    """Add to the cache file by an atomic replace. Entries that other processes added meanwhile are kept."""
    path = cache_file(device)
    launches = _read_cache(path)
    launches.setdefault(name, {})[_text(key)] = config
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
        warnings.warn(f"cannot save tuned launches in {path}: {error}", stacklevel=2)
