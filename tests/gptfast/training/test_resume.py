"""A resumed run continues bit for bit, wherever and however it ended."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gptfast import GPTConfig
from gptfast.checkpoint import run_folder
from gptfast.training import trainer
from gptfast.training.config import TrainConfig
from tests.support.tiny_runs import TEXT, before_step, raising, tiny_run

MEASURED = ("tokens_per_second", "mfu", "memory_bytes", "data_seconds")


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run of 20 steps with dropout, whose checkpoints lie between its evaluations."""
    return tiny_run(tmp_path, dropout=0.1, checkpoint_interval=3)


def outcome(path: Path) -> tuple[dict, dict, list]:
    """Tensors of all files, states of checkpoints, and the log without measurements of time and memory."""
    tensors = {
        f"{file.relative_to(path)}: {name}": tensor
        for file in sorted(path.rglob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    states = {file.parent.name: json.loads(file.read_text()) for file in path.rglob("state.json")}
    log = [{k: v for k, v in entry.items() if k not in MEASURED} for entry in run_folder.read_log(path)]
    return tensors, states, log


def assert_same_outcome(path: Path, expected: Path) -> None:
    (tensors, states, log), (expected_tensors, expected_states, expected_log) = outcome(path), outcome(expected)
    assert tensors.keys() == expected_tensors.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[name])]
    assert not different
    assert states == expected_states
    assert log == expected_log


def train_until(config: TrainConfig, step: int) -> None:
    """Train until a step fails."""
    with pytest.MonkeyPatch.context() as patched:
        before_step(patched, step, raising(ConnectionError("power cut")))
        with pytest.raises(ConnectionError):
            trainer.train(config)


def train_whole(config: TrainConfig, tmp_path: Path, **changes) -> dict:
    """Train without a break into `tmp_path`/whole."""
    return trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole"), **changes))


def resume(config: TrainConfig, **changes) -> dict:
    return trainer.train(dataclasses.replace(config, resume=True, **changes))


def assert_close_outcome(tmp_path: Path, atol: float) -> None:
    (tensors, *_), (expected, *_) = (outcome(tmp_path / name) for name in ("run", "whole"))
    assert tensors.keys() == expected.keys()
    assert all(torch.allclose(tensor, expected[name], atol=atol) for name, tensor in tensors.items())


def checkpoints(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "muon"},
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"accumulation": 2, "schedule": "wsd"},
        {"lora_rank": 2},
        {"lora_rank": 2, "optimizer": "muon", "lora_targets": ("*.attn.c_attn", "*.mlp.c_fc")},
        {"freeze": ("transformer.w?e.weight",)},
        {"model": GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, pad_vocab_size_to=64, tie_weights=False)},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_resume_continues_bit_for_bit(config, tmp_path, settings):
    config = dataclasses.replace(config, **settings)
    summary = train_whole(config, tmp_path)
    train_until(config, 11)
    assert checkpoints(tmp_path / "run") == ["step-00000006", "step-00000009"]
    again = resume(config)
    assert (again["val_loss"], again["steps"]) == (summary["val_loss"], 20)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_resume_starts_over_before_the_first_checkpoint(config, tmp_path):
    train_whole(config, tmp_path, resume=True)  # where there is no run yet
    train_until(config, 2)
    resume(config)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_resume_takes_more_steps(config, tmp_path):
    config = dataclasses.replace(config, schedule="constant", eval_interval=20)
    train_whole(config, tmp_path, steps=24)
    trainer.train(config)
    with pytest.raises(ValueError, match=r"has done 20 steps.*--steps"):
        resume(config)
    resume(config, steps=24)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_resume_may_change_padding_of_the_vocabulary(config, tmp_path):
    """Padding exists in memory alone; another width rounds a little differently."""
    train_whole(config, tmp_path)
    train_until(config, 11)
    resume(config, model=dataclasses.replace(config.model, pad_vocab_size_to=32))
    assert_close_outcome(tmp_path, 1e-4)


@pytest.mark.slow
def test_resume_may_change_compilation(config, tmp_path):
    config = dataclasses.replace(config, dtype="float32", model=dataclasses.replace(config.model, dropout=0.0))
    train_whole(config, tmp_path)
    train_until(config, 7)
    train_until(dataclasses.replace(config, resume=True, compile=True), 14)
    resume(config)
    assert_close_outcome(tmp_path, 1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8}, "batch_size=4.* 8; .*--out"),
        ({"seed": 1}, "seed=1337.* 1; "),
        ({"tokenizer": "byte"}, "tokenizer='char'.* 'byte'; "),
        ({"model": GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)}, "n_layer=1.* 2; "),
        ({"freeze": ("*.bias",)}, r"freeze=\[\].* \['\*.bias'\]; "),
        ({"resume": False}, "is not empty.*--out.*--resume"),
    ],
)
def test_resume_rejects_other_settings(config, tmp_path, settings, message):
    train_until(config, 5)
    before = outcome(tmp_path / "run")[2]
    with pytest.raises(ValueError, match=message):
        trainer.train(dataclasses.replace(config, **{"resume": True, **settings}))
    assert outcome(tmp_path / "run")[2] == before


def test_resume_rejects_another_text(config, tmp_path):
    train_until(config, 5)
    (tmp_path / "text.txt").write_text(TEXT.replace("be", "eb", 1))
    with pytest.raises(ValueError, match=r"text.txt is not the data of the run in .*run: train was 1548 "):
        resume(config)


def test_resume_passes_over_a_damaged_checkpoint(config, tmp_path, capsys):
    train_whole(config, tmp_path)
    train_until(config, 11)
    file = tmp_path / "run/checkpoints/step-00000009/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resume(config)
    assert "continuing from an older checkpoint: " in capsys.readouterr().out
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_resume_rejects_checkpoints_of_another_model(config, tmp_path):
    train_until(config, 5)
    shape = GPTConfig(16, n_layer=2, n_head=2, n_embd=16)
    train_until(dataclasses.replace(config, out=str(tmp_path / "other"), model=shape), 5)
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "other/checkpoints").rename(tmp_path / "run/checkpoints")
    with pytest.raises(ValueError, match=r"step 3 .*config.json.*transformer\.h\.1"):
        resume(config)


def test_resume_drops_the_log_of_steps_that_are_repeated(config, tmp_path):
    """And a line that was never finished."""
    train_until(config, 11)
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"step": 11, "lo')
    assert [entry["step"] for entry in run_folder.read_log(tmp_path / "run")] == [1, 5, 8, 8, 10]
    train_until(dataclasses.replace(config, resume=True), 9)
    assert [entry["step"] for entry in run_folder.read_log(tmp_path / "run")] == [1, 5, 8, 8]


def test_run_folder_admits_one_trainer(config, tmp_path):
    with run_folder.RunFolder(tmp_path / "run"):
        for again in (False, True):
            with pytest.raises(ValueError, match=r"another process trains in the run folder .*run"):
                trainer.train(dataclasses.replace(config, resume=again))
    trainer.train(config)


def test_full_disk_ends_the_run_and_loses_nothing(config, tmp_path, monkeypatch):
    train_whole(config, tmp_path)
    train_until(config, 8)
    save_file = safetensors.torch.save_file

    def full(tensors, path, metadata):
        if "step-00000015" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(OSError, match=r"^cannot write .*step-00000015.* step 12$"):
            resume(config)
    assert checkpoints(tmp_path / "run") == ["step-00000009", "step-00000012"]
    resume(config)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_resume_does_not_need_the_pretrained_weights(config, tmp_path):
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "base"), steps=4))
    tuned = dataclasses.replace(config, init_from=str(tmp_path / "base"), lora_rank=2)
    train_whole(tuned, tmp_path)
    train_until(tuned, 11)
    shutil.rmtree(tmp_path / "base")
    resume(tuned)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"no pretrained model '.*base'"):
        trainer.train(dataclasses.replace(tuned, out=str(tmp_path / "new")))


@pytest.fixture
def one_thread():
    """Sums depend on the number of threads, and threads of a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train_quietly(config: TrainConfig, started) -> None:
    torch.set_num_threads(1)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    started.set()
    trainer.train(config)


def newest(path: Path) -> str | None:
    """Name of the last checkpoint."""
    return max((p.name for p in path.glob("checkpoints/step-*")), default=None)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_resume_survives_fifty_kills_at_random_moments(config, tmp_path):
    config = dataclasses.replace(config, schedule="constant", eval_interval=100, checkpoint_interval=20)
    endless = dataclasses.replace(config, steps=10**9, resume=True)
    context = multiprocessing.get_context("forkserver")  # the server imports everything once: processes start fast
    context.set_forkserver_preload(["gptfast.training.trainer", __name__])
    draw, before = random.Random(0), None
    for number in range(50):
        started = context.Event()
        process = context.Process(target=train_quietly, args=(endless, started))
        process.start()
        assert started.wait(60)
        deadline = time.monotonic() + 60
        while number % 2 and newest(tmp_path / "run") == before:  # every other process writes a checkpoint
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.join(draw.uniform(0.0, 0.4))
        assert process.exitcode is None
        before = newest(tmp_path / "run")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    done = run_folder.read_log(tmp_path / "run")[-1]["step"]
    assert done > 25 * 20
    ends = dataclasses.replace(config, steps=done + 50)
    trainer.train(dataclasses.replace(ends, resume=True))
    trainer.train(dataclasses.replace(ends, out=str(tmp_path / "whole")))
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
