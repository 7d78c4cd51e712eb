"""Measuring time and memory so that variants can be compared: warmed up, interleaved, synchronised.

Two kinds of time. `kernel_times` is for single operators: the GPU's own time between two events, with cold caches and
a queue that is already full, so that gaps between launches are not counted; the time that the host needs for the call
stands beside it. `step_times` is for whole steps, where such gaps are part of the truth: wall clock between two
synchronisations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

WARMUP_CALLS, WARMUP_SECONDS = 3, 1.0
MIN_ROUNDS, MAX_ROUNDS = 5, 50

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Call:
    """What is timed: `run(prepare())`, of which `prepare` is left out of the time."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass(frozen=True)
class Times:
    """Seconds of each round; `host` is None where it is the same thing."""

    device: list[float]
    host: list[float] | None


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, interpolated between neighbours."""
    ordered = sorted(seconds)
    if len(ordered) == 1:
        return dict.fromkeys(("p20", "median", "p80"), ordered[0])
    p20, *_, p80 = statistics.quantiles(ordered, n=5, method="inclusive")
    return {"p20": p20, "median": statistics.median(ordered), "p80": p80}


class Stopwatch(Protocol):
    """Runs a call once and gives the seconds of the device and those of the host."""

    def __call__(self, call: Call) -> tuple[float, float]: ...


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
    """Seconds between two CUDA events around the call, its inputs out of the L2 cache.

    Before the first event the GPU is kept busy overwriting a buffer several times the size of its L2 cache: that
    flushes the cache, and while it lasts the host queues the whole call, so that the GPU never waits for the host.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self.buffer = torch.empty(max(4 * properties.L2_cache_size, 2**27), dtype=torch.int8, device=device)
        self.host_seconds: dict[Call, float] = {}  # as last seen
        self.flush_seconds = self._measure_flush()

    def _measure_flush(self) -> float:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.buffer.zero_()
        events[0].record()
        for _ in range(10):
            self.buffer.zero_()
        events[1].record()
        torch.cuda.synchronize(self.device)
        return events[0].elapsed_time(events[1]) / 10 / 1e3

    def __call__(self, call: Call) -> tuple[float, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        prepared = call.prepare()
        torch.cuda.synchronize(self.device)
        # a call that was never seen may take its time on the host; half as much again is for noise
        lead = 1.5 * self.host_seconds.get(call, 1e-3)
        for _ in range(1 + min(int(lead / self.flush_seconds), 1000)):
            self.buffer.zero_()
        start.record()
        begin = time.perf_counter()
        call.run(prepared)
        host = time.perf_counter() - begin
        end.record()
        torch.cuda.synchronize(self.device)
        self.host_seconds[call] = host
        return start.elapsed_time(end) / 1e3, host


def kernel_times(calls: Mapping[Key, Call], device: torch.device, seconds: float = 0.3) -> dict[Key, Times]:
    """Time operators against each other; see `interleave`."""
    if device.type == "cuda":
        return interleave(calls, EventClock(device), seconds, host=True)
    return interleave(calls, WallClock(device), seconds)


def step_times(calls: Mapping[Key, Call], device: torch.device, seconds: float) -> dict[Key, Times]:
    """Time whole steps against each other; see `interleave`."""
    return interleave(calls, WallClock(device), seconds)


def interleave(calls: Mapping[Key, Call], clock: Stopwatch, seconds: float, host: bool = False) -> dict[Key, Times]:
    """Time calls in turn, so that what changes with time (clocks, heat, neighbours) strikes all of them alike.

    Args:
        calls: by name. Each is warmed up before any of them is measured.
        clock: runs and times one call.
        seconds: about how long the measured rounds of all calls may take together; there are at least 5 rounds of
            each and at most 50.
        host: keep the time of the host as well.

    Returns:
        The times of each call, in the order in which they were taken.
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
    for order in _orders(list(calls), rounds=rounds_within(seconds, sum(warm.values()))):
        for name in order:
            taken[name].append(clock(calls[name]))
    return {
        name: Times([device for device, _ in pairs], [on_host for _, on_host in pairs] if host else None)
        for name, pairs in taken.items()
    }


def rounds_within(seconds: float, one_round: float) -> int:
    """How many rounds of `one_round` seconds to measure in about `seconds`."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(one_round, 1e-9))))


def _orders(names: list[Key], rounds: int) -> Iterator[list[Key]]:
    """Every call follows every other one: what the caches and clocks inherit must not be always the same call's."""
    for number in range(rounds):
        shift = number % len(names)
        yield names[shift:] + names[:shift]


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Device memory that the call needs at its peak beyond what was allocated before it; None without a counter."""
    if device.type != "cuda":
        return None
    prepared = call.prepare()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call.run(prepared)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
