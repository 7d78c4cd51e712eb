"""Options, fixtures and files of the benchmarks: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.measuring import machine, model_providers
from benchmarks.measuring.model_bench import GenerationComparison, TrainingComparison
from benchmarks.measuring.model_providers import ModelCase
from benchmarks.measuring.operator_bench import Case, Comparison, first_line
from benchmarks.measuring.operator_providers import PROVIDERS
from benchmarks.measuring.pytest_bridge import Comparable, NoGPU
from benchmarks.reporting import results
from gptfast import hardware

LIMITS = pytest.StashKey[dict[str, Any]]()
NOT_MEASURED = pytest.StashKey[list[dict[str, str]]]()
DEADLINE = pytest.StashKey[float]()


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
    except ValueError as error:  # an override that is no number: say so before hours of measuring, not after
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
        config.option.reportchars += "s"  # a speed that is missing is a result: say why


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip(f"the time budget of {item.config.getoption('time_budget'):g} s is spent")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    outcome = yield
    if call.excinfo is not None and call.when in ("setup", "call"):
        parameters = _parameters(item)
        case = parameters.get("case")
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
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info["gptfast"] = machine.describe(machine.default_device()) | {"limits": config.stash.get(LIMITS, None)}


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["gptfast_results"] = results.FORMAT
    output_json["not_measured"] = config.stash[NOT_MEASURED]
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)
        row["params"] = None  # objects; `extra_info` names them


@pytest.fixture(scope="session")
def device() -> torch.device:
    return machine.default_device()


@pytest.fixture(scope="session")
def limits(device: torch.device, pytestconfig: pytest.Config) -> dict[str, Any]:
    """What the machine can do at best, measured before anything else."""
    pytestconfig.stash[LIMITS] = machine.measure_limits(device)
    return pytestconfig.stash[LIMITS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out combinations that do not exist: a provider without that pass, or not meant for that case."""
    items[:] = [item for item in items if _exists(**_parameters(item))]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return dict(item.callspec.params) if hasattr(item, "callspec") else {}


def _exists(case: Any = None, provider: str = "", mode: str = "", **_: Any) -> bool:
    if isinstance(case, Case):
        return provider not in case.without and mode in PROVIDERS[case.suite][provider].modes
    return not isinstance(case, ModelCase) or provider in case.providers


def _selected(request: pytest.FixtureRequest, case: Case | ModelCase) -> list[str]:
    """The providers of the tests that will run for `case`: these are measured in turn, others cost no time."""
    chosen = [_parameters(item) for item in request.session.items]
    return list(dict.fromkeys(parameters["provider"] for parameters in chosen if parameters.get("case") is case))


@pytest.fixture(scope="module")
def comparison(request: pytest.FixtureRequest, case: Case | ModelCase, device: torch.device) -> Iterator[Comparable]:
    names = _selected(request, case)
    if isinstance(case, Case) and device.type != "cuda":
        yield NoGPU()
        return
    limits = request.getfixturevalue("limits")
    try:
        compared: Comparable
        if isinstance(case, Case):
            compared = Comparison(case, [PROVIDERS[case.suite][name] for name in names], device, limits)
        else:
            known = model_providers.providers(request.config.getoption("nanogpt"))
            kind = TrainingComparison if case.suite == "training" else GenerationComparison
            compared = kind(case, [known[name] for name in names], device, limits)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"out of memory: {first_line(error)}")
    yield compared
    compared.close()
