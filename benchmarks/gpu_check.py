"""Everything that a CUDA machine can tell, within a time budget: `python -m benchmarks.gpu_check --out DIR`.

The tests, then the launch configurations, which the later stages use, then the operators' errors and their speeds, then
whole models and their profiles, then the report. A stage that is out of time is interrupted, so that it still writes
what it has, and the next one starts.
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
import tyro

ROOT = Path(__file__).parents[1]
# stage, files and the share of what is left of the time
SUITES = (
    (
        "operators",
        (
            "test_causal_attention.py",
            "test_causal_attention_qkvpacked.py",
            "test_decode_attention.py",
            "test_gelu_ffn.py",
            "test_linear_cross_entropy.py",
            "test_int8_linear.py",
            "test_ffn_up.py",
            "test_layer_norm.py",
            "test_add_layer_norm.py",
        ),
        0.5,
    ),
    ("training", ("test_training.py",), 0.7),
    ("generation", ("test_generation.py",), 0.8),
)
# what explains the figures of whole models
PROFILES = (
    ("profile-training", ("training", "--provider", "triton captured", "--batch", "32"), 0.5),
    ("profile-generation", ("generation", "--batch", "1", "--length", "16"), 1.0),
)
SANITIZER, SANITIZED = "compute-sanitizer", "test_every_run_gives_the_same_bits"
REPORT_SECONDS = 20.0
GRACE_SECONDS = 30.0  # to write down what there is, once interrupted


@dataclass
class Options:
    """Run the tests and every benchmark on this machine's GPU, most valuable first."""

    out: str
    """Folder for results, logs and the report."""
    time_budget: float = 480.0
    """Seconds for all of it."""
    sanitize: bool = False
    """Run every kernel once under compute-sanitizer's memcheck and racecheck as well, after the tests: minutes."""
    skip_tests: bool = False
    """Leave the tests out: figures of kernels that were not tested."""
    skip_tuning: bool = False
    """Launch by the tables and rules that come with the package."""


@dataclass
class Outcome:
    """How a stage ended."""

    stage: str
    status: str
    seconds: float


def main() -> None:
    """Run the stages; exit status 1 if one of them failed, 2 without a GPU."""
    options = tyro.cli(Options)
    if not torch.cuda.is_available():
        print("benchmarks.gpu_check: no CUDA GPU was found; `make bench` measures a CPU", file=sys.stderr)
        sys.exit(2)
    if not options.time_budget > 0:
        print(f"benchmarks.gpu_check: --time-budget must be above 0, got {options.time_budget}", file=sys.stderr)
        sys.exit(2)
    if options.sanitize and shutil.which(SANITIZER) is None:
        print(f"benchmarks.gpu_check: --sanitize needs {SANITIZER}, of the CUDA toolkit, on the PATH", file=sys.stderr)
        sys.exit(2)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.time_budget
    # what is tuned here is for this run, and shows in its results
    os.environ["GPTFAST_CACHE"] = str(out / "cache")
    # tests start commands elsewhere, and the packages need not be installed
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    outcomes = []
    for stage, seconds, command in stages(options, deadline):
        print(f"{stage}: at most {seconds:.0f} s", flush=True)
        outcomes.append(run_stage(stage, command, seconds, out / f"{stage}.log"))
        print(f"{stage}: {outcomes[-1].status} after {outcomes[-1].seconds:.0f} s", flush=True)
        text = json.dumps([asdict(outcome) for outcome in outcomes], indent=2)
        (out / "stages.json").write_text(text + "\n", encoding="utf-8")
    sys.exit(any(outcome.status.startswith("failed") for outcome in outcomes))


def stages(options: Options, deadline: float) -> Iterator[tuple[str, float, list[str]]]:
    """Name, seconds and command of each stage, what an earlier one left over going to the later ones."""
    python = [sys.executable, "-m"]

    def left(share: float) -> float:
        return max(share * (deadline - REPORT_SECONDS - time.monotonic()), 1.0)

    if not options.skip_tests:
        # most of their time is that of compilers, which run side by side
        parallel = ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
        yield "tests", left(0.4), [*python, "pytest", "tests", "-q", "-m", "not slow and not large", *parallel]
        yield "large-tests", left(0.1), [*python, "pytest", "tests/kernels", "-q", "-m", "large"]
    for tool in ("memcheck", "racecheck") if options.sanitize else ():
        # small cases of every operator, forward and backward; memory that is cached would hide what is out of bounds
        wrapped = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", SANITIZER, "--tool", tool, "--error-exitcode", "9"]
        yield tool, left(0.3), [*wrapped, *python, "pytest", "tests/kernels/test_operators.py", "-q", "-k", SANITIZED]
    if not options.skip_tuning:
        yield "tuning", left(0.25), [*python, "benchmarks.tune", "--out", str(Path(options.out, "launches"))]
    yield "accuracy", left(0.1), [*python, "benchmarks.accuracy", "--out", options.out]
    for stage, suites, share in SUITES:
        seconds = left(share)
        files = [str(ROOT / "benchmarks" / suite) for suite in suites]
        # the suite itself starts nothing new after its time, and needs some to end what it has begun
        budget = f"{max(seconds - GRACE_SECONDS, 1.0):.0f}"
        to = ["--results", options.out, "--results-name", stage, "--time-budget", budget]
        yield stage, seconds, [*python, "pytest", *files, "--benchmark-only", "-q", *to]
    for stage, arguments, share in PROFILES:
        yield stage, left(share), [*python, "benchmarks.profiling", *arguments]
    yield "report", REPORT_SECONDS + left(1.0), [*python, "benchmarks.report", options.out]


def run_stage(stage: str, command: list[str], seconds: float, log: Path) -> Outcome:
    """Run `command` with its output in `log`; after `seconds` it is interrupted, and killed if that does not help."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=_listen,
        )
        try:
            code = process.wait(timeout=seconds)
            status = "passed" if code == 0 else f"failed with exit status {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            status = _stop(process)
        except BaseException:
            _kill(process)
            raise
    return Outcome(stage, status, time.monotonic() - start)


def _listen() -> None:
    """Let an interrupt reach the stage: a shell has its background jobs ignore them, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _stop(process: subprocess.Popen) -> str:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _kill(process)
        return "killed: it did not end within its time"
    return "interrupted: out of time"


def _kill(process: subprocess.Popen) -> None:
    """With all that it started: compilers run in processes of their own."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    main()
