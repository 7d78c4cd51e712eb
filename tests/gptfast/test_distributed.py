"""Processes that train together are one process that trains on the whole batch, and survive each other's deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gptfast.distributed import World

ROOT = Path(__file__).parents[3]
TEXT = "To be, or not to be, that is the question:\n" * 40
SETTINGS = {
    "data": "text.txt", "device": "cpu", "dtype": "float32", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16,
    "batch_size": 8, "steps": 60, "eval_interval": 25, "eval_batches": 3, "checkpoint_interval": 10,
    "sample_tokens": 5, "dropout": 0.0,
}  # fmt: skip


def train(out: str, **settings) -> list[str]:
    """The arguments of `python`."""
    options = {**SETTINGS, "out": out, **settings}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not True]
    return ["-m", "gptfast", "train", "shakespeare-char-cpu", *flags, *(["--resume"] if "resume" in settings else [])]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "GPTFAST_PEAK_FLOPS": "1e12",
    }


def torchrun(folder: Path, arguments: list[str], *options: str) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        *options,
        *arguments,
    ]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process: subprocess.Popen, timeout: float = 120) -> tuple[str, str]:
    try:
        return process.communicate(timeout=timeout)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a single process has trained, in as many parts as there are processes, into `whole`."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text.txt").write_text(TEXT)
    subprocess.run(
        [sys.executable, *train("whole", accumulation=2)],
        cwd=folder,
        env=environment(),
        check=True,
        capture_output=True,
    )
    return folder


def losses(path: Path) -> list[tuple[int, str, float]]:
    entries = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return [(e["step"], name, e[name]) for e in entries for name in ("loss", "grad_norm", "val_loss") if name in e]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file}/{name}": tensor
        for file in ("model", "optimizer")
        for name, tensor in safetensors.torch.load_file(path / f"checkpoints/step-00000060/{file}.safetensors").items()
    }


def assert_same_run(path: Path, expected: Path, tolerance: float) -> None:
    actual, whole = losses(path), losses(expected)
    assert [entry[:2] for entry in actual] == [entry[:2] for entry in whole]
    assert [entry[2] for entry in actual] == pytest.approx([entry[2] for entry in whole], rel=1e-5)
    ours, theirs = tensors(path), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "tolerance"), [("ddp", 0.0), ("fsdp", 1e-5)])
def test_two_processes_are_one(folder, parallel: str, tolerance: float):
    """Bit for bit with `ddp`: halves are added, and divided by two. `fsdp` takes the gradient's norm part by part."""
    process = torchrun(folder, train(parallel, parallel=parallel))
    out, err = finished(process)
    assert process.returncode == 0, err
    assert "Warning" not in err
    assert out.count("validation loss") == 4, "one process prints"
    assert f"2 processes ({parallel})" in out
    assert_same_run(folder / parallel, folder / "whole", tolerance)
    summary = json.loads((folder / parallel / "summary.json").read_text())
    assert summary["processes"] == 2
    whole = json.loads((folder / "whole/summary.json").read_text())
    # the work of a token over the peaks of all
    assert summary["mfu"] / summary["tokens_per_second"] == pytest.approx(whole["mfu"] / whole["tokens_per_second"] / 2)


@pytest.mark.slow
def test_blocks_whose_parameters_are_parted_can_be_compiled(folder, monkeypatch):
    """All by one compilation, but the first: more layers than the versions that PyTorch keeps of a function."""
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    settings = {"parallel": "fsdp", "n_layer": 9, "steps": 4, "eval_interval": 4}
    for out, flags, recompiled in (("plain", [], 0), ("compiled", ["--compile"], 2)):
        process = torchrun(folder, [*train(out, **settings), *flags])
        _, err = finished(process)
        assert process.returncode == 0, err
        # in each process once: the first block has nothing to add
        assert err.count("Recompiling function forward") == recompiled, err
    plain, compiled = (losses(folder / out) for out in ("plain", "compiled"))
    assert len(plain) == 3 + 2  # of the first step and the last, and validation
    assert [entry[:2] for entry in compiled] == [entry[:2] for entry in plain]
    assert [entry[2] for entry in compiled] == pytest.approx([entry[2] for entry in plain], rel=1e-4)


def killed(process: subprocess.Popen, checkpoint: Path) -> None:
    """Kill the second process of a run when it has written a checkpoint."""
    deadline = time.monotonic() + 60
    while not checkpoint.is_dir():
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            content, parent = path.read_bytes(), (path.parent / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if int(parent) == process.pid and b"\0RANK=1\0" in content:
            os.kill(int(path.parent.name), signal.SIGKILL)
            return
    pytest.fail("there is no second process")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_the_death_of_a_process_ends_the_job_and_loses_nothing(folder):
    """It goes on in one process, from the checkpoint of two."""
    process = torchrun(folder, train("dead", steps=100_000, warmup_steps=100))
    killed(process, folder / "dead/checkpoints/step-00000020")
    started = time.monotonic()
    _, err = finished(process)
    assert process.returncode != 0
    assert time.monotonic() - started < 60
    assert "gptfast: another process of this run has ended" in err
    assert "Signal 9 (SIGKILL)" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_torchrun_begins_again_from_the_last_checkpoint(folder):
    process = torchrun(folder, train("again"), "--max-restarts=1")
    killed(process, folder / "again/checkpoints/step-00000020")
    out, err = finished(process)
    assert process.returncode == 0, err
    assert "continuing again after step " in out
    assert_same_run(folder / "again", folder / "whole", 0.0)


@pytest.mark.slow
def test_from_two_processes_to_one_and_back(folder):
    steps = {"warmup_steps": 100, "schedule": "constant"}
    subprocess.run(
        [sys.executable, *train("steady", accumulation=2, **steps)],
        cwd=folder, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    for arguments, alone in (
        (train("back", steps=20, **steps), False),
        (train("back", steps=40, accumulation=2, resume=True, **steps), True),
        (train("back", resume=True, **steps), False),
    ):
        process = (
            subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True
            )
            if alone
            else torchrun(folder, arguments)
        )
        _, err = finished(process)
        assert process.returncode == 0, err
    ours, theirs = tensors(folder / "back"), tensors(folder / "steady")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.slow
def test_errors_of_settings_are_said_once(folder):
    process = torchrun(folder, train("wrong", batch_size=9))
    _, err = finished(process)
    assert process.returncode != 0
    assert err.count("gptfast: batch_size must be a multiple of 2 processes times accumulation=1, got 9") == 1
    process = torchrun(folder, train("whole"))
    _, err = finished(process)
    assert err.count("gptfast: the run folder whole is not empty") == 1


def test_a_process_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = World.from_environment()
    assert (world.is_main, world.is_single) == (True, True)
    world.connect(torch.device("cpu"))
    assert world.device(torch.device("cuda")) == torch.device("cuda")
    assert world.run_on_main(lambda: "result") == "result"
    assert (world.any(True), world.any(False)) == (True, False)
    assert world.sum(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "status", "printed"), [([], 0, "usage: gptfast"), (["fly"], 2, "unknown command 'fly'")]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_one_of_several_ends_before_the_interpreter_does(arguments, status: int, printed: str, processes: int):
    """Threads of Gloo that outlive their group abort an interpreter that shuts down, now and then."""
    code = "import atexit\natexit.register(print, 'shutting down')\nfrom gptfast.cli import program\nprogram()"
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"} if processes == 2 else {}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment() | world, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout.count("shutting down")) == (status, 0 if processes == 2 else 1)
    assert printed in ended.stdout + ended.stderr


def test_what_torchrun_tells(monkeypatch):
    for name, value in {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 4, 2)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match=r"WORLD_SIZE is set without .*LOCAL_RANK"):
        World.from_environment()


def test_each_process_has_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    world = World(5, 8, 1, 4)
    assert world.device(torch.device("cuda")) == torch.device("cuda:1")
    assert world.device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be cuda"):
        world.device(torch.device("cuda:0"))
    with pytest.raises(ValueError, match="8 processes need as many GPUs, found 4"):
        World(0, 8, 0, 8).device(torch.device("cuda"))
