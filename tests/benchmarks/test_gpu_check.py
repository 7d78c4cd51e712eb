import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import kernels
from benchmarks import gpu_check, profiling
from benchmarks.gpu_check import run_stage, stages
from benchmarks.measuring import model_bench
from benchmarks.measuring.processes import run_command


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def collect(*arguments: str) -> list[str]:
    """The tests that a pytest command would run."""
    command = [*arguments, "--collect-only"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=gpu_check.ROOT)
    assert listed.returncode == 0, listed.stdout + listed.stderr
    return [line for line in listed.stdout.splitlines() if "::" in line]


def exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(gpu_check.main, "benchmarks.gpu_check", arguments)
    return stopped.value.code


def test_a_stage_passes_or_fails_and_leaves_its_output(tmp_path):
    passed = run_stage("fine", python("print('hello')"), 60, tmp_path / "fine.log")
    assert passed.status == "passed"
    assert (tmp_path / "fine.log").read_text() == "hello\n"
    failed = run_stage("bad", python("raise SystemExit(3)"), 60, tmp_path / "bad.log")
    assert failed.status == "failed with exit status 3, see bad.log"


@pytest.mark.parametrize("ignored", [False, True], ids=["", "in the background"])
def test_a_stage_out_of_time_is_interrupted_and_writes_what_it_has(tmp_path, ignored):
    # a shell starts at once on a busy machine, too
    command = ["bash", "-c", "trap 'echo so far; exit 130' INT; while true; do sleep 0.1; done"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        outcome = run_stage("slow", command, 1.0, tmp_path / "slow.log")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == "interrupted: out of time"
    assert (tmp_path / "slow.log").read_text() == "so far\n"


def test_a_stage_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    command = ["bash", "-c", "trap '' INT; while true; do sleep 0.1; done"]
    assert run_stage("deaf", command, 1.0, tmp_path / "deaf.log").status.startswith("killed")


def test_stages_are_planned_tests_first_within_the_remaining_time():
    planned = list(stages("out", time.monotonic() + 400))
    assert [stage for stage, _, _ in planned] == [
        *("tests", "large-tests", "tuning", "accuracy", "operators", "training", "generation"),
        *("profile-training", "profile-generation", "report"),
    ]
    assert all(0 < seconds <= 400 for _, seconds, _ in planned)
    assert next(stages("out", 0.0, skip_tests=True))[0] == "tuning"
    assert next(stages("out", 0.0, skip_tests=True, skip_tuning=True))[0] == "accuracy"


def test_every_operator_goes_through_the_sanitizer():
    planned = list(stages("out", time.monotonic() + 400, sanitize=True))
    assert [stage for stage, _, _ in planned][1:5] == ["large-tests", "memcheck", "racecheck", "tuning"]
    for stage, _, command in planned[2:4]:
        assert command[:7] == [
            "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", stage, "--error-exitcode", "9"
        ]  # fmt: skip
    tests = "\n".join(collect(*command[7:]))
    for name in set(kernels.__all__) - {"quantize_int8", "reference", "warmup"}:
        assert f"[{name}-" in tests


def test_the_test_stages_leave_out_only_slow_tests():
    """Tests that fill a GPU's memory run alone, the others in parallel."""
    marked = [command[command.index("-m", 3) + 1] for _, _, command in list(stages("out", 0.0))[:2]]
    pytest_command = [sys.executable, "-m", "pytest", "tests/kernels/test_cuda.py", "-q", "-m"]
    whole, others, large = (len(collect(*pytest_command, expression)) for expression in ("not slow", *marked))
    assert others > 0
    assert large > 0
    assert others + large == whole


def test_every_suite_can_be_collected_without_any_time_left():
    planned = {stage: command for stage, _, command in stages("out", time.monotonic() + 1)}
    assert all(collect(*planned[suite]) for suite in gpu_check.SUITES)


@pytest.mark.parametrize(("stage", "arguments", "share"), gpu_check.PROFILES)
def test_the_profiled_suites_and_providers_exist(monkeypatch, stage, arguments, share):
    seen = []
    build = lambda suite, *others: seen.append((suite, others[-2])) or 1 / 0  # noqa: E731
    monkeypatch.setattr(profiling, "build_model_bench", build)
    with pytest.raises(ZeroDivisionError):
        run_command(profiling.main, "benchmarks.profiling", arguments)
    ((suite, provider),) = seen
    assert suite in model_bench.BENCHES
    assert provider in model_bench.providers(nanogpt=None)


@pytest.mark.parametrize(
    ("on_gpu", "arguments", "message"),
    [
        (False, [], "no CUDA GPU was found; `make bench` measures a CPU"),
        (True, ["--sanitize"], "--sanitize needs compute-sanitizer of the CUDA toolkit on the PATH"),
        (True, ["--time-budget", "0"], "--time-budget must be above 0, got 0.0"),
    ],
)
def test_a_check_that_cannot_run_ends_in_one_line(on_gpu, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert exit_status("--out", str(tmp_path / "out"), *arguments) == 2
    assert capsys.readouterr().err == f"benchmarks.gpu_check: {message}\n"
    assert not (tmp_path / "out").exists()


def test_all_stages_run_and_a_failure_is_reported(tmp_path, monkeypatch, capsys):
    def planned(*_):
        yield "tests", 60, python("raise SystemExit(1)")
        # the packages of this checkout are found from other folders, too
        code = "import os; os.chdir('/'); import gptfast; print(gptfast.__file__, os.environ['PYTHONPATH'])"
        yield "report", 60, python(code)

    monkeypatch.setattr(gpu_check, "stages", planned)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("GPTFAST_CACHE", "elsewhere")  # restored afterwards
    monkeypatch.setenv("PYTHONPATH", "/more")
    assert exit_status("--out", str(tmp_path)) == 1
    statuses = [(row["stage"], row["status"]) for row in json.loads((tmp_path / "stages.json").read_text())]
    assert statuses == [("tests", "failed with exit status 1, see tests.log"), ("report", "passed")]
    assert "report: passed after" in capsys.readouterr().out
    found = f"{gpu_check.ROOT / 'gptfast/__init__.py'} {gpu_check.ROOT}:/more\n"
    assert (tmp_path / "report.log").read_text() == found
