"""Processes that train together equal one process with the whole batch, and survive each other's deaths."""

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
from tests.support.tiny_runs import TEXT

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data": "text.txt", "device": "cpu", "dtype": "float32", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16,
    "batch_size": 8, "steps": 60, "eval_interval": 25, "eval_batches": 3, "checkpoint_interval": 10,
    "sample_tokens": 5, "dropout": 0.0,
}  # fmt: skip
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "GPTFAST_PEAK_FLOPS": "1e12",
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def train(out: str, *flags: str, **settings) -> list[str]:
    """Arguments of `python` that train."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in {**SETTINGS, "out": out, **settings}.items()]
    return ["-m", "gptfast", "train", "shakespeare-char-cpu", *options, *flags]


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen, fails: bool = False) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode != 0) is fails, err
    return out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the run `single` of one process, which accumulates as many parts as there are processes."""
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text.txt").write_text(TEXT)
    finish(start(folder, *train("single", accumulation=2)))
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


def assert_same_losses(path: Path, expected: Path, tolerance: float = 1e-5) -> None:
    actual, wanted = losses(path), losses(expected)
    assert [entry[:2] for entry in actual] == [entry[:2] for entry in wanted]
    assert [entry[2] for entry in actual] == pytest.approx([entry[2] for entry in wanted], rel=tolerance)


def assert_same_tensors(path: Path, expected: Path, tolerance: float = 0.0) -> None:
    actual, wanted = tensors(path), tensors(expected)
    assert actual.keys() == wanted.keys()
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "tolerance"), [("ddp", 0.0), ("fsdp", 1e-5)])
def test_two_processes_equal_one(folder, parallel: str, tolerance: float):
    """Bit for bit with `ddp`: halves are added, and divided by two. `fsdp` sums the gradient norm over shards."""
    out, err = finish(start(folder, *TORCHRUN, *train(parallel, parallel=parallel)))
    assert "Warning" not in err
    assert out.count("validation loss") == 4, "one process prints"
    assert f"2 processes ({parallel})" in out
    assert_same_losses(folder / parallel, folder / "single")
    assert_same_tensors(folder / parallel, folder / "single", tolerance)
    two, one = (json.loads((folder / out / "summary.json").read_text()) for out in (parallel, "single"))
    assert two["processes"] == 2
    # MFU divides by the peaks of all devices
    assert two["mfu"] / two["tokens_per_second"] == pytest.approx(one["mfu"] / one["tokens_per_second"] / 2)


@pytest.mark.slow
def test_fsdp_compiles_blocks_once(folder, monkeypatch):
    """For more layers than the versions of a function that PyTorch keeps."""
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    settings = {"parallel": "fsdp", "n_layer": 9, "steps": 4, "eval_interval": 4}
    for out, flags, recompiled in (("plain", [], 0), ("compiled", ["--compile"], 2)):
        _, err = finish(start(folder, *TORCHRUN, *train(out, *flags, **settings)))
        # once in each process: the first block has no pending residual
        assert err.count("Recompiling function forward") == recompiled, err
    assert len(losses(folder / "plain")) == 3 + 2  # of the first step and the last, and validation
    assert_same_losses(folder / "compiled", folder / "plain", tolerance=1e-4)


def kill_second_process(torchrun: subprocess.Popen, checkpoint: Path) -> None:
    """Kill rank 1 once a checkpoint exists."""
    deadline = time.monotonic() + 60
    while not checkpoint.is_dir():
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            content, parent = path.read_bytes(), (path.parent / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if int(parent) == torchrun.pid and b"\0RANK=1\0" in content:
            os.kill(int(path.parent.name), signal.SIGKILL)
            return
    pytest.fail("there is no second process")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_death_of_a_process_ends_the_job_in_a_line(folder):
    process = start(folder, *TORCHRUN, *train("dead", steps=100_000, warmup_steps=100))
    kill_second_process(process, folder / "dead/checkpoints/step-00000020")
    started = time.monotonic()
    _, err = finish(process, fails=True)
    assert time.monotonic() - started < 60
    assert "gptfast: another process of this run has ended" in err
    assert "Signal 9 (SIGKILL)" in err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_torchrun_restarts_from_the_last_checkpoint(folder):
    process = start(folder, *TORCHRUN, "--max-restarts=1", *train("again"))
    kill_second_process(process, folder / "again/checkpoints/step-00000020")
    out, _ = finish(process)
    assert "continuing again after step " in out
    assert_same_losses(folder / "again", folder / "single")
    assert_same_tensors(folder / "again", folder / "single")


@pytest.mark.slow
def test_checkpoint_continues_with_another_number_of_processes(folder):
    settings = {"warmup_steps": 100, "schedule": "constant"}
    finish(start(folder, *train("steady", accumulation=2, **settings)))
    finish(start(folder, *TORCHRUN, *train("back", steps=20, **settings)))
    finish(start(folder, *train("back", "--resume", steps=40, accumulation=2, **settings)))
    finish(start(folder, *TORCHRUN, *train("back", "--resume", **settings)))
    assert_same_tensors(folder / "back", folder / "steady")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": "wrong", "batch_size": 9}, "gptfast: batch_size must be a multiple of 2 processes"),
        ({"out": "single"}, "gptfast: the run folder single is not empty"),
    ],
)
def test_error_in_the_settings_is_printed_once(folder, settings: dict, message: str):
    _, err = finish(start(folder, *TORCHRUN, *train(**settings)), fails=True)
    assert err.count(message) == 1


def test_world_of_a_single_process(monkeypatch):
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
def test_process_of_torchrun_skips_interpreter_shutdown(arguments, status: int, printed: str, processes: int):
    """Gloo threads that outlive their group sometimes abort an interpreter that shuts down."""
    code = "import atexit\natexit.register(print, 'shutting down')\nfrom gptfast.cli import program\nprogram()"
    world = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"} if processes == 2 else {}
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **ENVIRONMENT, **world}, capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout.count("shutting down")) == (status, 0 if processes == 2 else 1)
    assert printed in ended.stdout + ended.stderr


def test_world_reads_the_variables_of_torchrun(monkeypatch):
    for name, value in {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RESTART_COUNT": "2"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 4, 2)
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match=r"WORLD_SIZE .*LOCAL_RANK"):
        World.from_environment()


def test_world_gives_each_process_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    world = World(5, 8, 1, 4)
    assert world.device(torch.device("cuda")) == torch.device("cuda:1")
    assert world.device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device .*cuda:0"):
        world.device(torch.device("cuda:0"))
    with pytest.raises(ValueError, match=r"8 processes .* 4"):
        World(0, 8, 0, 8).device(torch.device("cuda"))
