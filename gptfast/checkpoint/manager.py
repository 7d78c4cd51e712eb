"""Checkpoints: everything that a training run needs to resume bit for bit.

    checkpoints/step-00000250/
        model.safetensors      parameters, by name
        optimizer.safetensors  optimizer state, by parameter and key, and float16's loss scale
        state.json             step, best losses and data fingerprints; written last

A folder is written under another name and renamed, so it appears whole or not at all. Its files have checksums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptfast.checkpoint.atomic_files import read_json, read_tensors, sync_folder, write_json, write_tensors

_NAME = re.compile(r"step-(\d{8,})")
_MAX_PENDING = 2  # each holds a copy of the weights in memory


@dataclass(frozen=True)
class Checkpoint:
    """State of a run after a step.

    Args:
        step: steps done.
        model: parameters by name.
        optimizer: optimizer state by name.
        state: all else, as JSON.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointManager:
    """Writes the checkpoints of a run, keeps the last few, and finds the newest one.

    A thread writes while training continues, in the order of the calls. A later call raises the errors of that thread.

    Args:
        folder: of the checkpoints.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: list[Future[None]] = []

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint and remove the oldest ones. Its tensors must not change until it is written."""
        self.submit(lambda: self._write(checkpoint))

    def submit(self, write: Callable[[], None]) -> None:
        """Run `write` in the thread, after what was submitted before.

        Raises:
            OSError: an earlier write failed.
        """
        while len(self._pending) >= _MAX_PENDING or (self._pending and self._pending[0].done()):
            self._pending.pop(0).result()
        self._pending.append(self._thread.submit(write))

    def close(self) -> None:
        """Wait until everything is on the disk, and end the thread.

        Raises:
            OSError: a write failed.
        """
        try:
            while self._pending:
                self._pending.pop(0).result()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _write(self, checkpoint: Checkpoint) -> None:
        path = self._folder / f"step-{checkpoint.step:08d}"
        partial = self._folder / f".{path.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
            partial.mkdir(parents=True)
            write_tensors(partial / "model.safetensors", checkpoint.model)
            write_tensors(partial / "optimizer.safetensors", checkpoint.optimizer)
            content = {"step": checkpoint.step, **checkpoint.state}
            write_json(partial / "state.json", {**content, "sha256": _checksum(content)})
            sync_folder(partial)
            self._remove(path)  # a damaged one: the run resumed before it and repeats its step
            os.rename(partial, path)
            sync_folder(self._folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            kept = [step for step, _ in self._list()]
            last = f"the last one is of step {kept[-1]}" if kept else "there is none"
            raise OSError(f"cannot write the checkpoint {path}: {error}; {last}") from error
        earlier = [path for step, path in self._list() if step <= checkpoint.step]
        # later ones are damaged too, or the run would have resumed from them
        later = [path for step, path in self._list() if step > checkpoint.step]
        for path in (*earlier[: -self._keep], *later):
            self._remove(path)

    def _remove(self, path: Path) -> None:
        if path.exists():
            # renamed first: half a checkpoint must not look like one
            removed = self._folder / f".{path.name}.removed"
            shutil.rmtree(removed, ignore_errors=True)
            os.rename(path, removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _list(self) -> list[tuple[int, Path]]:
        """Steps and folders of the checkpoints, oldest first."""
        entries = self._folder.iterdir() if self._folder.is_dir() else iter(())
        matches = ((_NAME.fullmatch(path.name), path) for path in entries)
        return sorted((int(match[1]), path) for match, path in matches if match)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """Read the newest checkpoint that is not damaged.

        Returns:
            The checkpoint, None if there are none, and an error message for each newer, damaged one.

        Raises:
            ValueError: all checkpoints are damaged.
        """
        damage: list[str] = []
        for _, path in reversed(self._list()):
            try:
                return _read(path), damage
            except (OSError, ValueError) as error:
                damage.append(str(error))
        if damage:
            raise ValueError(f"no checkpoint can be read: {'; '.join(damage)}")
        return None, damage

    def exist(self) -> bool:
        """True if there are checkpoints, damaged ones included."""
        return bool(self._list())

    def clean(self) -> None:
        """Remove what killed processes left half-written."""
        if self._folder.is_dir():
            for path in self._folder.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Checkpoint:
    content = read_json(path / "state.json")
    expected = content.pop("sha256", None)
    if _checksum(content) != expected:
        raise ValueError(f"{path / 'state.json'} is damaged: its checksum does not match")
    model, optimizer = (read_tensors(path / f"{name}.safetensors") for name in ("model", "optimizer"))
    return Checkpoint(content.pop("step"), model, optimizer, content)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
