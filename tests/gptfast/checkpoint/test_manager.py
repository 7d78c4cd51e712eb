"""Checkpoints come back bit for bit or not at all, whatever happens to the disk and the process."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gptfast.checkpoint.atomic_files import checksum
from gptfast.checkpoint.manager import Checkpoint, CheckpointManager
from tests.support.files import TENSORS, names, no_space

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(
        step,
        {"wte.weight": torch.arange(6.0).view(2, 3) + step, "ln.bias": torch.tensor([0.5, math.pi])},
        {"wte.weight/exp_avg": torch.full((2, 3), step / 7), "wte.weight/step": torch.tensor(float(step))},
        {"best": {"val_loss": 1.25, "train_loss": None}, "data": {"train": "9 tokens, é"}},
    )


def save(folder: Path, *steps: int, keep: int = 2) -> None:
    checkpoints = CheckpointManager(folder, keep)
    for step in steps:
        checkpoints.save(checkpoint(step))
    checkpoints.close()


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    return CheckpointManager(folder, 2).latest()


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return checksum(ours) == checksum(theirs)


def same(ours: Checkpoint, theirs: Checkpoint) -> bool:
    tensors = same_tensors(ours.model, theirs.model) and same_tensors(ours.optimizer, theirs.optimizer)
    return tensors and (ours.step, ours.state) == (theirs.step, theirs.state)


def test_latest_returns_the_checkpoint_saved(tmp_path):
    save(tmp_path / "not/yet/there", 3)
    found, wrong = latest(tmp_path / "not/yet/there")
    assert same(found, checkpoint(3))
    assert found.state.keys() == {"best", "data"}
    assert wrong == []
    assert names(tmp_path / "not/yet/there/step-00000003") == sorted(FILES)


def test_save_takes_all_dtypes_and_shapes(tmp_path):
    checkpoints = CheckpointManager(tmp_path, 1)
    checkpoints.save(Checkpoint(0, TENSORS, {}, {}))
    checkpoints.close()
    found = latest(tmp_path)[0]
    assert (found.step, found.optimizer, found.state) == (0, {}, {})
    assert same_tensors(found.model, TENSORS)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_save_keeps_the_last_ones_by_number(tmp_path, keep: int):
    # the last name is longer: the order is by number
    save(tmp_path, 7, 250, 99_999_999, 100_000_000, keep=keep)
    assert names(tmp_path) == sorted(
        ["step-00000250", "step-99999999", "step-100000000"][-keep:],
    )
    assert latest(tmp_path)[0].step == 100_000_000


def test_save_removes_more_when_keep_shrinks(tmp_path):
    save(tmp_path, 1, 2, 3, keep=3)
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_latest_finds_nothing_in_other_folders(tmp_path):
    assert latest(tmp_path / "missing") == (None, [])
    for name in ("step-1", "step-0000000x", "other", "step-00000001.old"):
        (tmp_path / name).mkdir()
    assert latest(tmp_path) == (None, [])


@pytest.mark.parametrize("file", FILES)
def test_latest_notices_every_flipped_bit(tmp_path, file: str):
    """Without a bit of the header's key of the checksum, the file is read unchecked and no value is lost."""
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002" / file
    whole, found_out = path.read_bytes(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found, wrong = latest(tmp_path)
        assert same(found, checkpoint(found.step)), place
        assert found.step == 2 - len(wrong)
        if wrong:
            assert f"{path} is damaged: " in wrong[0]
            found_out += 1
    assert found_out > 0.9 * len(whole)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"}")


@pytest.mark.parametrize("damage", [truncated, emptied, longer, Path.unlink, a_folder])
@pytest.mark.parametrize("file", FILES)
def test_latest_skips_damaged_checkpoints(tmp_path, file: str, damage):
    save(tmp_path, 1, 2, 3, keep=3)
    damage(tmp_path / "step-00000003" / file)
    found, wrong = latest(tmp_path)
    assert same(found, checkpoint(2))
    assert len(wrong) == 1
    assert str(tmp_path / "step-00000003" / file) in wrong[0]
    damage(tmp_path / "step-00000002" / file)
    found, wrong = latest(tmp_path)
    assert same(found, checkpoint(1))
    assert ["step-00000003" in wrong[0], "step-00000002" in wrong[1]] == [True, True]
    damage(tmp_path / "step-00000001" / file)
    with pytest.raises(ValueError, match=r"^no checkpoint can be read: .*step-00000003.*; .*02.*; .*01") as raised:
        latest(tmp_path)
    assert "\n" not in str(raised.value)


def test_latest_needs_the_checksum_of_the_state(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001/state.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"state.json is damaged: its checksum does not match"):
        latest(tmp_path)


def test_save_replaces_a_damaged_checkpoint(tmp_path):
    save(tmp_path, 1, 2)
    truncated(tmp_path / "step-00000002/model.safetensors")
    (tmp_path / "step-00000002/more").touch()
    save(tmp_path, 2)
    found, wrong = latest(tmp_path)
    assert same(found, checkpoint(2))
    assert wrong == []
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert names(tmp_path / "step-00000002") == sorted(FILES)


def no_space_for_safetensors(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def after(calls: int, function, failing):
    """Wrap a function so that it fails after a number of calls."""
    counted = iter(range(calls))

    def call(*arguments, **options):
        return failing() if next(counted, None) is None else function(*arguments, **options)

    return call


FAILURES = {
    "the first file": (os, "fsync", no_space, 0),
    "the second file": (os, "fsync", no_space, 1),
    "the third file": (os, "fsync", no_space, 2),
    "the folder": (os, "fsync", no_space, 3),
    "the name": (os, "rename", no_space, 0),
    "tensors": (safetensors.torch, "save_file", no_space_for_safetensors, 0),
    "more tensors": (safetensors.torch, "save_file", no_space_for_safetensors, 1),
}


def write_more(checkpoints: CheckpointManager) -> None:
    for _ in range(3):  # the third blocks while two are pending
        checkpoints.submit(lambda: None)


@pytest.mark.parametrize(("module", "name", "failing", "calls"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("later", [write_more, CheckpointManager.close])
@pytest.mark.parametrize("older", [(), (1, 2)], ids=["", "older ones"])
def test_later_calls_raise_a_failed_write_once(tmp_path, monkeypatch, module, name, failing, calls, later, older):
    save(tmp_path, *older)
    checkpoints = CheckpointManager(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(module, name, after(calls, getattr(module, name), failing))
        checkpoints.save(checkpoint(3))
        last = "the last one is of step 2" if older else "there is none"
        expected = rf"^cannot write the checkpoint {re.escape(str(tmp_path))}/step-00000003: .*No space left.*; {last}$"
        with pytest.raises(OSError, match=expected) as raised:
            later(checkpoints)
    assert "\n" not in str(raised.value)
    assert names(tmp_path) == [f"step-{step:08d}" for step in older]
    if older:
        assert same(latest(tmp_path)[0], checkpoint(2))
    if later is write_more:  # an error is raised once; later writes may succeed
        checkpoints.save(checkpoint(4))
        checkpoints.close()
        assert same(latest(tmp_path)[0], checkpoint(4))


def test_failed_replacement_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    """The damaged checkpoint is either unchanged or gone, never half there."""
    for calls in (0, 1):
        save(tmp_path, 1, 2)
        truncated(tmp_path / "step-00000002/model.safetensors")
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", after(calls, os.rename, no_space))
            with pytest.raises(OSError, match=r"cannot write .*No space left.*; the last one is of step"):
                save(tmp_path, 2)
        assert names(tmp_path) == ["step-00000001", "step-00000002"][: 2 - calls]
        assert same(latest(tmp_path)[0], checkpoint(1))


@pytest.mark.parametrize("keep", [1, 2])
def test_save_removes_damaged_checkpoints_of_later_steps(tmp_path, keep: int):
    save(tmp_path, 10, 20, 30, keep=3)
    for step in (20, 30):
        truncated(tmp_path / f"step-000000{step}/model.safetensors")
    save(tmp_path, 15, keep=keep)
    assert names(tmp_path) == ["step-00000010", "step-00000015"][-keep:]
    assert same(latest(tmp_path)[0], checkpoint(15))


def test_latest_ignores_what_a_killed_process_left(tmp_path):
    save(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-00000002", tmp_path / ".step-00000003.partial")  # all but renamed
    (tmp_path / ".step-00000004.partial").mkdir()
    (tmp_path / ".step-00000004.partial/model.safetensors.partial").write_bytes(b"\x10")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".step-00000000.removed")
    (tmp_path / ".step-00000000.removed/state.json").unlink()
    found, wrong = latest(tmp_path)
    assert same(found, checkpoint(2))
    assert wrong == []
    CheckpointManager(tmp_path, 2).clean()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    CheckpointManager(tmp_path / "missing", 2).clean()


def test_save_discards_what_a_killed_process_left(tmp_path):
    for name in (".step-00000001.partial", ".step-00000001.removed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other").write_bytes(b"\x10")
    for _ in range(2):  # the second replaces the first
        save(tmp_path, 1)
        assert names(tmp_path / "step-00000001") == sorted(FILES)
    assert names(tmp_path) == ["step-00000001"]


def test_submit_blocks_only_while_two_writes_are_pending(tmp_path):
    checkpoints, disk, written = CheckpointManager(tmp_path, 3), threading.Event(), []

    def slowly():
        assert disk.wait(10)
        written.append("first")

    checkpoints.submit(slowly)
    checkpoints.save(checkpoint(2))
    assert written == []  # `save` did not block
    third = threading.Thread(target=checkpoints.submit, args=[lambda: written.append(latest(tmp_path)[0].step)])
    third.start()
    third.join(0.05)
    assert third.is_alive()
    assert not (tmp_path / "step-00000002").exists()
    disk.set()
    third.join(10)
    checkpoints.save(checkpoint(4))
    checkpoints.close()
    assert written == ["first", 2]
    assert latest(tmp_path)[0].step == 4


def test_submit_runs_in_one_thread(tmp_path):
    checkpoints, threads = CheckpointManager(tmp_path, 2), []
    for _ in range(4):
        checkpoints.submit(lambda: threads.append(threading.current_thread()))
    checkpoints.close()
    assert len(set(threads)) == 1
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()
