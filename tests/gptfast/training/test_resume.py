"""A run that is taken up again goes on bit for bit, wherever it was left and however it ended."""

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

CHANGES_FROM_RUN_TO_RUN = ("tokens_per_second", "mfu", "memory_bytes", "data_seconds")


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run of 20 steps with dropout, whose checkpoints lie between its evaluations."""
    return tiny_run(tmp_path, dropout=0.1, checkpoint_interval=3)


def outcome(path: Path) -> tuple[dict, dict, list]:
    """Tensors of all files, what is known beside them, and the log without its measurements of time."""
    tensors = {
        f"{file.relative_to(path)}: {name}": tensor
        for file in sorted(path.rglob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    states = {file.parent.name: json.loads(file.read_text()) for file in path.rglob("state.json")}
    log = [{k: v for k, v in entry.items() if k not in CHANGES_FROM_RUN_TO_RUN} for entry in run_folder.read_log(path)]
    return tensors, states, log


def assert_same_outcome(path: Path, expected: Path) -> None:
    (tensors, states, log), (expected_tensors, expected_states, expected_log) = outcome(path), outcome(expected)
    assert tensors.keys() == expected_tensors.keys()
    different = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[name])]
    assert not different
    assert states == expected_states
    assert log == expected_log


def train_until(config: TrainConfig, step: int) -> None:
    """Take steps until one fails as if the machine had."""
    with pytest.MonkeyPatch.context() as patched:
        before_step(patched, step, raising(ConnectionError("power cut")))
        with pytest.raises(ConnectionError):
            trainer.train(config)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "muon"},
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"accumulation": 2, "schedule": "wsd"},
        {"lora_rank": 2},
        {"freeze": ("transformer.w?e.weight",)},
        {"model": GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, pad_vocab_size_to=64, tie_weights=False)},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_it_goes_on_bit_for_bit(config, tmp_path, settings):
    config = dataclasses.replace(config, **settings)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    summary = trainer.train(whole)
    train_until(config, 11)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000006", "step-00000009"]
    again = trainer.train(dataclasses.replace(config, resume=True))
    assert (again["val_loss"], again["steps"]) == (summary["val_loss"], 20)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_before_the_first_checkpoint_it_begins_anew(config, tmp_path):
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole"), resume=True))  # of which there is nothing
    train_until(config, 2)
    trainer.train(dataclasses.replace(config, resume=True))
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_more_steps(config, tmp_path):
    constant = dataclasses.replace(config, schedule="constant")
    trainer.train(dataclasses.replace(constant, out=str(tmp_path / "whole"), steps=24, eval_interval=20))
    trainer.train(dataclasses.replace(constant, eval_interval=20))
    with pytest.raises(ValueError, match=r"has done 20 steps.*--steps"):
        trainer.train(dataclasses.replace(constant, resume=True))
    trainer.train(dataclasses.replace(constant, steps=24, eval_interval=20, resume=True))
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_another_padding_and_number_of_parts_are_the_same_run(config, tmp_path):
    """Rows in memory alone; parts round a little differently."""
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    train_until(config, 11)
    model = dataclasses.replace(config.model, pad_vocab_size_to=32)
    trainer.train(dataclasses.replace(config, model=model, resume=True))
    (tensors, *_), (expected, *_) = (outcome(tmp_path / name) for name in ("run", "whole"))
    assert tensors.keys() == expected.keys()
    assert all(torch.allclose(tensor, expected[name], atol=1e-4) for name, tensor in tensors.items())


@pytest.mark.slow
def test_from_eager_to_compiled_and_back(config, tmp_path):
    config = dataclasses.replace(config, dtype="float32", model=dataclasses.replace(config.model, dropout=0.0))
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    train_until(config, 7)
    train_until(dataclasses.replace(config, resume=True, compile=True), 14)
    trainer.train(dataclasses.replace(config, resume=True))
    (tensors, *_), (expected, *_) = (outcome(tmp_path / name) for name in ("run", "whole"))
    assert tensors.keys() == expected.keys()
    assert all(torch.allclose(tensor, expected[name], atol=1e-5) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8}, "has batch_size=4, which cannot change to 8; give a new --out"),
        ({"seed": 1}, "has seed=1337, which cannot change to 1"),
        ({"tokenizer": "byte"}, "has tokenizer='char', which cannot change to 'byte'"),
        ({"model": GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)}, "n_layer=1, which cannot"),
        ({"freeze": ("*.bias",)}, r"has freeze=\[\], which cannot change to \['\*.bias'\]"),
        ({"resume": False}, "is not empty; give a new one with --out, or continue it with --resume"),
    ],
)
def test_another_run_is_not_the_same_run(config, tmp_path, settings, message):
    train_until(config, 5)
    before = outcome(tmp_path / "run")[2]
    with pytest.raises(ValueError, match=message):
        trainer.train(dataclasses.replace(config, **{"resume": True, **settings}))
    assert outcome(tmp_path / "run")[2] == before


def test_another_text_is_not_the_same_run(config, tmp_path):
    train_until(config, 5)
    (tmp_path / "text.txt").write_text(TEXT.replace("be", "eb", 1))
    with pytest.raises(
        ValueError, match=r"text.txt is not what the run in .*run was trained on: train was 1548 tokens, "
    ):
        trainer.train(dataclasses.replace(config, resume=True))


def test_a_damaged_checkpoint_is_passed_over(config, tmp_path, capsys):
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    train_until(config, 11)
    file = tmp_path / "run/checkpoints/step-00000009/optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    trainer.train(dataclasses.replace(config, resume=True))
    assert "continuing from an older checkpoint: " in capsys.readouterr().out
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_checkpoints_of_another_model_do_not_fit(config, tmp_path):
    train_until(config, 5)
    other = dataclasses.replace(
        config, out=str(tmp_path / "other"), model=GPTConfig(16, n_layer=2, n_head=2, n_embd=16)
    )
    train_until(other, 5)
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "other/checkpoints").rename(tmp_path / "run/checkpoints")
    with pytest.raises(
        ValueError, match=r"the checkpoint of step 3 does not fit config.json: parameter transformer.h.1"
    ):
        trainer.train(dataclasses.replace(config, resume=True))


def test_the_log_of_steps_that_are_taken_again_is_dropped(config, tmp_path):
    """And a line that was never finished."""
    train_until(config, 11)
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"step": 11, "lo')
    assert [entry["step"] for entry in run_folder.read_log(tmp_path / "run")] == [1, 5, 8, 8, 10]
    train_until(dataclasses.replace(config, resume=True), 9)
    assert [entry["step"] for entry in run_folder.read_log(tmp_path / "run")] == [1, 5, 8, 8]


def test_two_trainers_on_one_folder(config, tmp_path):
    with run_folder.RunFolder(tmp_path / "run"):
        for resume in (False, True):
            with pytest.raises(ValueError, match=r"another process trains in the run folder .*run; wait for it"):
                trainer.train(dataclasses.replace(config, resume=resume))
    trainer.train(config)


def test_a_full_disk_ends_the_run_and_loses_nothing(config, tmp_path, monkeypatch):
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    train_until(config, 8)
    save_file = safetensors.torch.save_file

    def full(tensors, path, metadata):
        if "step-00000015" in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(
            OSError, match=r"cannot write the checkpoint .*step-00000015.*; the last one is of step 12"
        ) as e:
            trainer.train(dataclasses.replace(config, resume=True))
    assert "\n" not in str(e.value)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000009", "step-00000012"]
    trainer.train(dataclasses.replace(config, resume=True))
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


def test_a_folder_that_cannot_be_written(config, monkeypatch):
    def read_only(*arguments, **options):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(ValueError, match=r"cannot create the run folder .*run: Read-only file system"):
        trainer.train(config)


def test_a_fine_tuned_run_goes_on_without_what_it_began_with(config, tmp_path):
    trainer.train(dataclasses.replace(config, out=str(tmp_path / "base"), steps=4))
    tuned = dataclasses.replace(config, init_from=str(tmp_path / "base"), lora_rank=2)
    trainer.train(dataclasses.replace(tuned, out=str(tmp_path / "whole")))
    train_until(tuned, 11)
    shutil.rmtree(tmp_path / "base")
    trainer.train(dataclasses.replace(tuned, resume=True))
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"no pretrained model '.*base'"):
        trainer.train(dataclasses.replace(tuned, out=str(tmp_path / "new")))


@pytest.fixture
def one_thread():
    """Sums depend on the number of threads; and those of one process wait for each other while another one runs."""
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
    """The last checkpoint that is there."""
    return max((p.name for p in path.glob("checkpoints/step-*")), default=None)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_fifty_kills_at_random_moments(config, tmp_path):
    """Processes that are killed without a warning; each goes on where the one before was."""
    config = dataclasses.replace(config, schedule="constant", eval_interval=100, checkpoint_interval=20)
    endless = dataclasses.replace(config, steps=10**9, resume=True)
    context = multiprocessing.get_context("forkserver")  # a server that has imported all: a start takes no time
    context.set_forkserver_preload(["gptfast.training.trainer", __name__])
    draw, before = random.Random(0), None
    for number in range(50):
        started = context.Event()
        process = context.Process(target=train_quietly, args=(endless, started))
        process.start()
        assert started.wait(60)
        deadline = time.monotonic() + 60
        while number % 2 and newest(tmp_path / "run") == before:  # every other one gets somewhere, however slowly
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
