"""Tests and benchmarks of a CUDA machine within a time budget: `python -m benchmarks.gpu_check --out DIR`.

The stages: the tests, the launch configurations, which later stages use, the operators' errors and speeds, whole models
and their profiles, the report. A stage that is out of time is interrupted, so that it writes what it has, and the next
one starts.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.measuring.processes import run_command

ROOT = Path(__file__).parents[1]
SUITES = {"operators": 0.5, "training": 0.7, "generation": 0.8}  # and their shares of the remaining time
# profiles that explain the figures of whole models, and their share
PROFILES = (
    ("profile-training", ("training", "--provider", "triton captured", "--batch", "32"), 0.5),
    ("profile-generation", ("generation", "--batch", "1", "--length", "16"), 1.0),
)
SANITIZER, SANITIZED = "compute-sanitizer", "test_operator_gives_the_same_bits_on_every_run"
REPORT_SECONDS = 20.0
GRACE_SECONDS = 30.0  # for an interrupted stage to write what it has


@dataclass
class Outcome:
    """The end of a stage."""

    stage: str
    status: str
    seconds: float


def main(
    out: str,
    time_budget: float = 480.0,
    sanitize: bool = False,
    skip_tests: bool = False,
    skip_tuning: bool = False,
) -> None:
    """Run the tests and every benchmark on this machine's GPU, the most valuable first.

    Args:
        out: folder for results, logs and the report.
        time_budget: seconds for all stages.
        sanitize: also run every kernel under compute-sanitizer's memcheck and racecheck, after the tests; minutes.
        skip_tests: measure kernels that were not tested.
        skip_tuning: launch by the tables and rules that come with the package.
    """
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU was found; `make bench` measures a CPU")
    if not time_budget > 0:
        raise ValueError(f"--time-budget must be above 0, got {time_budget}")
    if sanitize and shutil.which(SANITIZER) is None:
        raise ValueError(f"--sanitize needs {SANITIZER} of the CUDA toolkit on the PATH")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["GPTFAST_CACHE"] = str(folder / "cache")  # tune afresh, and keep the result with the figures
    # tests start commands in other folders, and the packages need not be installed
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    outcomes: list[Outcome] = []
    for stage, seconds, command in stages(out, time.monotonic() + time_budget, sanitize, skip_tests, skip_tuning):
        print(f"{stage}: at most {seconds:.0f} s", flush=True)
        outcomes.append(outcome := run_stage(stage, command, seconds, folder / f"{stage}.log"))
        print(f"{stage}: {outcome.status} after {outcome.seconds:.0f} s", flush=True)
        text = json.dumps([asdict(outcome) for outcome in outcomes], indent=2)
        (folder / "stages.json").write_text(text + "\n", encoding="utf-8")
    sys.exit(any(outcome.status.startswith("failed") for outcome in outcomes))


def stages(
    out: str, deadline: float, sanitize: bool = False, skip_tests: bool = False, skip_tuning: bool = False
) -> Iterator[tuple[str, float, list[str]]]:
    """Name, seconds and command of each stage; time that a stage leaves goes to the later ones."""
    python = [sys.executable, "-m"]

    def left(share: float) -> float:
        return max(share * (deadline - REPORT_SECONDS - time.monotonic()), 1.0)

    if not skip_tests:
        # most of their time is that of compilers, which run in parallel
        parallel = ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
        yield "tests", left(0.4), [*python, "pytest", "tests", "-q", "-m", "not slow and not large", *parallel]
        yield "large-tests", left(0.1), [*python, "pytest", "tests/kernels", "-q", "-m", "large"]
    for tool in ("memcheck", "racecheck") if sanitize else ():
        # small cases of every operator, forward and backward; the caching allocator would hide accesses out of bounds
        wrapped = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER, "--tool", tool, "--error-exitcode", "9"]
        yield tool, left(0.3), [*wrapped, *python, "pytest", "tests/kernels/test_operators.py", "-q", "-k", SANITIZED]
    if not skip_tuning:
        yield "tuning", left(0.25), [*python, "benchmarks.tune", "--out", str(Path(out, "launches"))]
    yield "accuracy", left(0.1), [*python, "benchmarks.accuracy", "--out", out]
    for suite, share in SUITES.items():
        seconds = left(share)
        # the suite starts no measurement after its budget, and needs some time to finish the last one
        budget = f"{max(seconds - GRACE_SECONDS, 1.0):.0f}"
        options = ["--benchmark-only", "-q", "--results", out, "--results-name", suite, "--time-budget", budget]
        yield suite, seconds, [*python, "pytest", str(ROOT / f"benchmarks/test_{suite}.py"), *options]
    for stage, arguments, share in PROFILES:
        yield stage, left(share), [*python, "benchmarks.profiling", *arguments]
    if importlib.util.find_spec("pandas"):  # else the folder's results are reported where it is installed
        yield "report", REPORT_SECONDS + left(1.0), [*python, "benchmarks.report", out]


def run_stage(stage: str, command: list[str], seconds: float, log: Path) -> Outcome:
    """Run `command` with its output in `log`. After `seconds` it is interrupted, and killed if it does not end."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            # background jobs of a shell ignore SIGINT, and their children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status = _wait(process, seconds, log)
        finally:
            if process.poll() is None:  # compilers run in child processes
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Outcome(stage, status, time.monotonic() - start)


def _wait(process: subprocess.Popen, seconds: float, log: Path) -> str:
    try:
        code = process.wait(timeout=seconds)
        return "passed" if code == 0 else f"failed with exit status {code}, see {log.name}"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_SECONDS)
        return "interrupted: out of time"
    except subprocess.TimeoutExpired:
        return "killed: it did not end within its time"


if __name__ == "__main__":
    run_command(main, "benchmarks.gpu_check")
