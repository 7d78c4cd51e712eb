import json
import signal
import subprocess
import sys
import time

import pytest
import torch
import tyro

import kernels
from benchmarks import gpu_check, profiling
from benchmarks.gpu_check import Options, run_stage, stages
from benchmarks.measuring import model_providers


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_passes_or_fails_and_leaves_its_output(tmp_path):
    passed = run_stage("fine", python("print('hello')"), 60, tmp_path / "fine.log")
    assert passed.status == "passed"
    assert (tmp_path / "fine.log").read_text() == "hello\n"
    failed = run_stage("bad", python("raise SystemExit(3)"), 60, tmp_path / "bad.log")
    assert failed.status == "failed with exit status 3, see bad.log"


@pytest.mark.parametrize("ignored", [False, True], ids=["", "in the background"])
def test_a_stage_without_time_is_interrupted_and_writes_what_it_has(tmp_path, ignored):
    # a shell is ready at once, however busy the machine is
    command = ["bash", "-c", "trap 'echo what there is; exit 130' INT; while true; do sleep 0.1; done"]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    start = time.monotonic()
    try:
        outcome = run_stage("slow", command, 1.0, tmp_path / "slow.log")
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == "interrupted: out of time"
    assert (tmp_path / "slow.log").read_text() == "what there is\n"
    assert time.monotonic() - start < 20


def test_a_stage_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE_SECONDS", 0.5)
    # a shell is ready at once, however busy the machine is
    command = ["bash", "-c", "trap '' INT; while true; do sleep 0.1; done"]
    assert run_stage("deaf", command, 1.0, tmp_path / "deaf.log").status.startswith("killed")


def test_tests_come_first_and_no_stage_has_more_than_is_left():
    planned = list(stages(Options(out="out", time_budget=400), time.monotonic() + 400))
    assert [(stage, round(seconds)) for stage, seconds, _ in planned] == [
        ("tests", 152),
        ("large-tests", 38),
        ("tuning", 95),
        ("accuracy", 38),
        ("operators", 190),
        ("training", 266),
        ("generation", 304),
        ("profile-training", 190),
        ("profile-generation", 380),
        ("report", 400),
    ]
    untested = stages(Options(out="out", skip_tests=True), time.monotonic() + 400)
    assert next(untested)[0] == "tuning"
    untuned = stages(Options(out="out", skip_tests=True, skip_tuning=True), time.monotonic() + 400)
    assert next(untuned)[0] == "accuracy"


def test_every_operator_goes_through_the_sanitizer():
    planned = list(stages(Options(out="out", sanitize=True), time.monotonic() + 400))
    assert [stage for stage, _, _ in planned][1:5] == ["large-tests", "memcheck", "racecheck", "tuning"]
    for stage, _, command in planned[2:4]:
        assert command[:7] == [
            "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", stage, "--error-exitcode", "9"
        ]  # fmt: skip
        listed = subprocess.run([*command[7:], "--collect-only"], capture_output=True, text=True, cwd=gpu_check.ROOT)
        assert listed.returncode == 0, listed.stdout + listed.stderr
        for name in set(kernels.__all__) - {"quantize_int8", "reference", "warmup"}:
            assert f"[{name}-" in listed.stdout


def test_a_sanitizer_that_is_not_there_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "out"), "--sanitize"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    assert "--sanitize needs compute-sanitizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_test_is_left_out_but_slow_ones():
    """What fills a GPU's memory runs alone, all else in parallel where that is installed."""
    marked = [command[command.index("-m", 3) + 1] for _, _, command in list(stages(Options(out="out"), 0.0))[:2]]
    counts = []
    for expression in ("not slow", *marked):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "tests/kernels/test_cuda.py",
            "--collect-only",
            "-q",
            "-m",
            expression,
        ]
        listed = subprocess.run(command, capture_output=True, text=True, cwd=gpu_check.ROOT)
        counts.append(sum("::" in line for line in listed.stdout.splitlines()))
    whole, others, large = counts
    assert others > 0
    assert large > 0
    assert others + large == whole


@pytest.mark.parametrize("budget", [400, 1])
def test_the_commands_are_pytests_own(budget):
    """Every command can be parsed, whatever is left of the time: pytest collects, with the suites' options."""
    for stage, _, command in stages(Options(out="out", time_budget=budget), time.monotonic() + budget):
        if stage.startswith("profile-"):
            assert command[1:3] == ["-m", "benchmarks.profiling"]
            options = tyro.cli(profiling.Options, args=command[3:])
            assert options.suite in profiling.MODELS
            assert options.provider is None or options.provider in model_providers.providers(nanogpt=None)
        elif stage not in ("tests", "large-tests", "tuning", "accuracy", "report"):
            done = subprocess.run([*command, "--collect-only"], capture_output=True, text=True, cwd=gpu_check.ROOT)
            assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ("benchmarks.gpu_check: no CUDA GPU was found; `make bench` measures a CPU\n")
    assert not (tmp_path / "out").exists()


def test_all_stages_run_in_turn_and_one_that_fails_is_told(tmp_path, monkeypatch, capsys):
    def planned(options, deadline):
        yield "tests", 60, python("raise SystemExit(1)")
        # from another folder too the packages of this checkout are found, beside those that were
        code = "import os; os.chdir('/'); import gptfast; print(gptfast.__file__, os.environ['PYTHONPATH'])"
        yield "report", 60, python(code)

    monkeypatch.setattr(gpu_check, "stages", planned)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    monkeypatch.setenv("GPTFAST_CACHE", "elsewhere")  # put back afterwards
    monkeypatch.setenv("PYTHONPATH", "/more")
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 1
    statuses = [(row["stage"], row["status"]) for row in json.loads((tmp_path / "stages.json").read_text())]
    assert statuses == [("tests", "failed with exit status 1, see tests.log"), ("report", "passed")]
    assert "report: passed after" in capsys.readouterr().out
    found = f"{gpu_check.ROOT / 'gptfast/__init__.py'} {gpu_check.ROOT}:/more\n"
    assert (tmp_path / "report.log").read_text() == found
