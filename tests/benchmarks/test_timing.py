import time

import pytest
import torch

from benchmarks.measuring import timing
from benchmarks.measuring.timing import Call, EventClock, WallClock, interleave, kernel_times, peak_bytes, percentiles

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_percentiles_interpolate_between_neighbours():
    assert percentiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0]) == pytest.approx({"p20": 2.0, "median": 3.5, "p80": 5.0})
    assert percentiles([7.0]) == {"p20": 7.0, "median": 7.0, "p80": 7.0}


def test_the_wall_clock_times_the_call_without_its_preparation():
    seen = []

    def prepare() -> str:
        time.sleep(0.05)
        return "prepared"

    def run(prepared: str) -> None:
        seen.append(prepared)
        time.sleep(0.02)

    # the least of several: a busy machine sleeps longer, never shorter
    taken = [WallClock(CPU)(Call(run, prepare)) for _ in range(5)]
    assert seen == ["prepared"] * 5
    assert all(device == host for device, host in taken)
    assert 0.02 <= min(device for device, _ in taken) < 0.05


def test_calls_are_warmed_up_before_any_is_measured_and_then_take_turns():
    log = []
    calls = {name: Call(lambda _, name=name: log.append(name)) for name in "abc"}
    times = interleave(calls, lambda call: (call.run(None) or 1.0, 2.0), seconds=0.0, host=True)
    warm, measured = log[: 3 * timing.WARMUP_CALLS], log[3 * timing.WARMUP_CALLS :]
    assert "".join(warm) == "aaabbbccc"
    assert "".join(measured) == "abcbcacab" + "abcbca"
    assert times["b"].device == [1.0] * timing.MIN_ROUNDS
    assert times["b"].host == [2.0] * timing.MIN_ROUNDS


def test_the_number_of_rounds_follows_their_duration():
    assert timing.rounds_within(1.0, one_round=0.1) == 10
    assert timing.rounds_within(1.0, one_round=0.9) == timing.MIN_ROUNDS
    assert timing.rounds_within(1.0, one_round=0.0) == timing.MAX_ROUNDS
    quick = interleave({"quick": Call(lambda _: None)}, WallClock(CPU), seconds=1.0)["quick"]
    assert timing.MIN_ROUNDS < len(quick.device) <= timing.MAX_ROUNDS
    assert quick.host is None


def test_a_cpu_has_no_peak_memory():
    assert peak_bytes(Call(lambda _: torch.empty(1000)), CPU) is None


@needs_cuda
def test_device_time_is_the_time_of_the_kernel():
    n = 2_000_000
    calls = {factor: Call(lambda _, factor=factor: torch.cuda._sleep(factor * n)) for factor in (1, 2)}
    times = kernel_times(calls, torch.device("cuda", 0))
    one, two = (percentiles(times[factor].device)["median"] for factor in (1, 2))
    assert two / one == pytest.approx(2.0, rel=0.05)
    assert percentiles(times[2].host)["median"] < one / 5


@needs_cuda
def test_device_time_has_no_gaps_between_launches():
    device = torch.device("cuda", 0)
    x = torch.randn(1024, device=device)

    def slow_launches(_: None) -> None:
        x.add_(1.0)
        time.sleep(0.002)
        x.add_(1.0)

    clock, call = EventClock(device), Call(slow_launches)
    clock(call)  # measures the host's time, for which the GPU is kept busy from now on
    seconds, host = clock(call)
    assert host > 0.002
    assert seconds < 0.0005


@needs_cuda
def test_peak_memory_is_that_of_the_call():
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()  # a cached block that is a little larger would be taken whole
    assert peak_bytes(Call(lambda _: torch.empty(2**22, dtype=torch.uint8, device=device)), device) == 2**22
