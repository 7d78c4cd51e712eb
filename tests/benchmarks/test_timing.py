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


def test_a_known_sleep_is_measured():
    """The least of several: a busy machine may sleep longer, never shorter."""
    taken = [WallClock(CPU)(Call(lambda _: time.sleep(0.02))) for _ in range(5)]
    assert all(device == host for device, host in taken)
    assert 0.02 <= min(device for device, _ in taken) < 0.03


def test_preparation_is_not_measured_and_reaches_the_call():
    seen = []

    def prepare() -> str:
        time.sleep(0.05)
        return "prepared"

    taken = [WallClock(CPU)(Call(seen.append, prepare))[0] for _ in range(3)]
    assert seen == ["prepared"] * 3
    assert min(taken) < 0.02


def test_calls_are_warmed_up_before_any_is_measured_and_then_take_turns():
    log = []
    calls = {name: Call(lambda _, name=name: log.append(name)) for name in "abc"}
    times = interleave(calls, lambda call: (call.run(None) or 1.0, 2.0), seconds=0.0, host=True)
    warm, measured = log[: 3 * timing.WARMUP_CALLS], log[3 * timing.WARMUP_CALLS :]
    assert "".join(warm) == "aaabbbccc"
    assert "".join(measured) == "abcbcacab" + "abcbca"
    assert times["b"].device == [1.0] * timing.MIN_ROUNDS
    assert times["b"].host == [2.0] * timing.MIN_ROUNDS


def test_rounds_follow_the_time_they_take():
    assert timing.rounds_within(1.0, one_round=0.1) == 10
    assert timing.rounds_within(1.0, one_round=0.9) == timing.MIN_ROUNDS
    assert timing.rounds_within(1.0, one_round=0.0) == timing.MAX_ROUNDS
    quick = interleave({"quick": Call(lambda _: None)}, WallClock(CPU), seconds=1.0)["quick"]
    assert timing.MIN_ROUNDS < len(quick.device) <= timing.MAX_ROUNDS
    assert quick.host is None


def test_a_cpu_has_no_memory_figure():
    assert peak_bytes(Call(lambda _: torch.empty(1000)), CPU) is None


@needs_cuda
def test_device_time_is_the_gpus_own():
    """A kernel that only waits, for n and for 2n clock cycles."""
    n = 2_000_000
    calls = {factor: Call(lambda _, factor=factor: torch.cuda._sleep(factor * n)) for factor in (1, 2)}
    times = kernel_times(calls, torch.device("cuda", 0))
    one, two = (percentiles(times[factor].device)["median"] for factor in (1, 2))
    assert two / one == pytest.approx(2.0, rel=0.05)
    assert percentiles(times[2].host)["median"] < one / 5


@needs_cuda
def test_gaps_between_launches_are_not_device_time():
    """The host dawdles between two kernels: the GPU's queue was filled before."""
    device = torch.device("cuda", 0)
    x = torch.randn(1024, device=device)

    def dawdle(_: None) -> None:
        x.add_(1.0)
        time.sleep(0.002)
        x.add_(1.0)

    clock, call = EventClock(device), Call(dawdle)
    clock(call)  # from now on it knows how long the host takes
    seconds, host = clock(call)
    assert host > 0.002
    assert seconds < 0.0005


@needs_cuda
def test_memory_is_what_the_call_allocates():
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()  # what others have left may be a little larger, and is taken whole
    assert peak_bytes(Call(lambda _: torch.empty(2**22, dtype=torch.uint8, device=device)), device) == 2**22
