"""Options, fixtures and result files of the benchmarks: `pytest benchmarks --benchmark-only`.

A suite is a module with `CASES` and a test that calls the fixture `record`. Providers are timed in turns and by the
clock of the GPU, which pytest-benchmark cannot do itself. Each benchmark therefore replays rounds that were already
timed: pytest-benchmark calls a function that advances the timer `MEASURED` by the seconds of one round, and reads the
timer before and after. Its table, statistics and JSON then hold the measured times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import RESULTS_FORMAT
from benchmarks.measuring import machine, model_bench
from benchmarks.measuring.bench import Bench, UnavailableError, first_line
from benchmarks.measuring.operator_bench import OperatorBench
from gptfast import hardware

LIMITS = pytest.StashKey[dict[str, Any]]()
NOT_MEASURED = pytest.StashKey[list[dict[str, str]]]()
DEADLINE = pytest.StashKey[float]()


class MeasuredTime:
    """Timer of pytest-benchmark that only `advance` moves."""

    __name__ = "measured"
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.seconds += seconds


MEASURED = MeasuredTime()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gptfast")
    group.addoption("--results", metavar="FOLDER", help="write FOLDER/<device>/<name>.json, for benchmarks.report")
    group.addoption("--results-name", metavar="NAME", default="bench", help="name of that file, default bench")
    group.addoption("--time-budget", metavar="SECONDS", type=float, help="start no measurement after this time")
    group.addoption("--nanogpt", metavar="CHECKOUT", help="folder with nanoGPT's model.py, measured as a peer")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOT_MEASURED] = []
    try:
        hardware.describe(torch.device("meta"))
    except ValueError as error:  # reject a malformed peak override before hours of measuring
        raise pytest.UsageError(str(error)) from error
    budget = config.getoption("time_budget")
    config.stash[DEADLINE] = float("inf") if budget is None else time.monotonic() + budget
    if config.getoption("results") is not None and not config.option.collectonly:
        folder = Path(config.getoption("results"), machine.slug(machine.default_device()))
        folder.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = str(folder / f"{config.getoption('results_name')}.json")
    if config.option.benchmark_columns is None:
        config.option.benchmark_columns = ["median", "iqr", "rounds"]
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # show why a measurement is missing


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bench" not in metafunc.fixturenames:
        return
    parameters, timed = [], pytest.mark.benchmark(timer=MEASURED)
    for case in metafunc.module.CASES:
        words = f"{case.suite} {case}".replace("=", "").replace(" ", "-")  # the form that `-k` selects
        parameters += [
            pytest.param(case, mode, provider, id=f"{words}-{mode}-{provider}", marks=timed)
            for mode, provider in case.measurements()
        ]
    metafunc.parametrize(("bench", "mode", "provider"), parameters, indirect=["bench"])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip(f"the time budget of {item.config.getoption('time_budget'):g} s is spent")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    outcome = yield
    if call.excinfo is not None and call.when in ("setup", "call"):
        parameters = _parameters(item)
        case = parameters.get("bench")
        item.config.stash[NOT_MEASURED].append(
            {
                "suite": getattr(case, "suite", item.name),
                "case": str(case),
                "mode": parameters.get("mode", ""),
                "provider": parameters.get("provider", ""),
                "reason": ("" if outcome.skipped else "failed: ") + first_line(call.excinfo.value),
            }
        )
    return outcome


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # the host's name is private
    machine_info["gptfast"] = machine.describe(machine.default_device()) | {"limits": config.stash.get(LIMITS, None)}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["gptfast_results"] = RESULTS_FORMAT
    output_json["not_measured"] = config.stash[NOT_MEASURED]
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        row["params"] = None  # objects; `extra_info` has their names


@pytest.fixture(scope="session")
def limits(pytestconfig: pytest.Config) -> dict[str, Any]:
    """Copy and matrix product rates of this machine, measured before anything else."""
    pytestconfig.stash[LIMITS] = machine.measure_limits(machine.default_device())
    return pytestconfig.stash[LIMITS]


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, limits: dict[str, Any]) -> Iterator[Bench]:
    """The bench of a case, shared by consecutive tests, with the providers that `-k` selects."""
    case, device = request.param, machine.default_device()
    selected = [_parameters(item) for item in request.session.items]
    names = dict.fromkeys(parameters["provider"] for parameters in selected if parameters.get("bench") is case)
    kind: type[Bench] = model_bench.BENCHES.get(case.suite, OperatorBench)
    is_model = case.suite in model_bench.BENCHES
    known = model_bench.providers(request.config.getoption("nanogpt")) if is_model else case.operator.providers
    try:
        bench = kind(case, [known[name] for name in names], device, limits)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {first_line(error)}")
    yield bench
    bench.close()


@pytest.fixture
def record(benchmark: Any, bench: Bench, mode: str, provider: str) -> Callable[[], None]:
    """Measure one provider and hand its times to pytest-benchmark, or skip with the reason."""

    def run() -> None:
        try:
            times, row = bench.row(provider, mode)
        except UnavailableError as reason:
            pytest.skip(str(reason))
        benchmark.group = f"{row['suite']} {row['case']} {mode}"
        benchmark.extra_info |= row
        rounds = iter(times.device)
        benchmark.pedantic(lambda: MEASURED.advance(next(rounds)), rounds=len(times.device))

    return run


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}
