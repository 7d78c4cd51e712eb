"""Time and memory of calls that are compared: warmed up, interleaved, synchronised.

`kernel_times` is for operators. It takes the GPU's time between two events, with cold caches and a full queue, so that
gaps between launches do not count; the host's time for the call is kept beside it. Whole steps, where such gaps do
count, are timed by `interleave` with the wall clock between two synchronisations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

WARMUP_CALLS, WARMUP_SECONDS = 3, 1.0
MIN_ROUNDS, MAX_ROUNDS = 5, 50

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Call:
    """A call `run(prepare())`; the time of `prepare` does not count."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Times:
    """Seconds of each round on the device, and of the host's call if that is another time."""

    device: list[float]
    host: list[float] | None


Clock = Callable[[Call], tuple[float, float]]  # runs a call once and returns the device's and the host's seconds


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Compute the median and the 20th and 80th percentile, interpolated between neighbours."""
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    values = torch.tensor(seconds, dtype=torch.float64).quantile(quantiles).tolist()
    return dict(zip(("p20", "median", "p80"), values, strict=True))


class WallClock:
    """Seconds between two synchronisations of `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Call) -> tuple[float, float]:
        prepared = call.prepare()
        synchronize(self.device)
        start = time.perf_counter()
        call.run(prepared)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        return seconds, seconds


class EventClock:
    """Seconds between two CUDA events around the call, with its inputs out of the L2 cache.

    Before the first event the GPU overwrites a buffer several times as large as its L2 cache. That flushes the cache,
    and lets the host queue the whole call meanwhile, so that the GPU never waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.device = device
        self.buffer = torch.empty(max(4 * cache, 2**27), dtype=torch.int8, device=device)
        self.host_seconds: dict[Call, float] = {}  # of the last run
        self._flush(1)
        self.flush_seconds = self._between_events(lambda: self._flush(10)) / 10

    def __call__(self, call: Call) -> tuple[float, float]:
        prepared = call.prepare()
        torch.cuda.synchronize(self.device)
        # keep the GPU busy for 1.5 times the host's last call, or for 1.5 ms before a first one
        lead = 1.5 * self.host_seconds.get(call, 1e-3)
        self._flush(1 + min(int(lead / self.flush_seconds), 1000))
        return self._between_events(lambda: self._run(call, prepared)), self.host_seconds[call]

    def _run(self, call: Call, prepared: Any) -> None:
        begin = time.perf_counter()
        call.run(prepared)
        self.host_seconds[call] = time.perf_counter() - begin

    def _flush(self, times: int) -> None:
        for _ in range(times):
            self.buffer.zero_()

    def _between_events(self, run: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end) / 1e3


def kernel_times(calls: Mapping[Key, Call], device: torch.device, seconds: float = 0.3) -> dict[Key, Times]:
    """Time operators in turns, see `interleave`: by CUDA events on a GPU, by the wall clock on a CPU."""
    if device.type == "cuda":
        return interleave(calls, EventClock(device), seconds, host=True)
    return interleave(calls, WallClock(device), seconds)


def interleave(calls: Mapping[Key, Call], clock: Clock, seconds: float, host: bool = False) -> dict[Key, Times]:
    """Time calls in turns, so that drifts of clocks, heat and other load affect all of them alike.

    All calls are warmed up before the first is measured. Their measured rounds take about `seconds` together;
    each call gets 5 to 50 rounds. `host` keeps the time of the host as well.
    """
    warm = {}
    for name, call in calls.items():
        for _ in range(WARMUP_CALLS):
            begin = time.perf_counter()
            clock(call)
            warm[name] = time.perf_counter() - begin
            if warm[name] > WARMUP_SECONDS:
                break
    taken: dict[Key, list[tuple[float, float]]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(rounds_within(seconds, sum(warm.values()))):
        for name in names:
            taken[name].append(clock(calls[name]))
        names = names[1:] + names[:1]  # rotated: no call always inherits the caches and clocks of the same other one
    return {
        name: Times([device for device, _ in pairs], [on_host for _, on_host in pairs] if host else None)
        for name, pairs in taken.items()
    }


def rounds_within(seconds: float, one_round: float) -> int:
    """Compute the number of rounds of `one_round` seconds that fit into `seconds`, from 5 to 50."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(one_round, 1e-9))))


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Measure the peak of the device memory that the call allocates; None on a CPU."""
    if device.type != "cuda":
        return None
    prepared = call.prepare()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call.run(prepared)  # noqa: F841 - the result stays alive until the peak is read
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
