"""Checkpoints: all that a training run needs to go on, bit for bit.

    checkpoints/step-00000250/
        model.safetensors      parameters, by name
        optimizer.safetensors  the optimizers' state, by parameter and key, and the scale of float16's loss
        state.json             the step, the best losses so far, what the data was; written last

A folder appears whole or not at all: it is written under another name, and renamed. Its files have checksums.
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


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after a step.

    Args:
        step: steps done.
        model: parameters by name.
        optimizer: the optimizers' state by name.
        state: all else, as JSON.
    """

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """Writes and finds the checkpoints of a run, the last few of which are kept.

    Writing is done by a thread while training goes on, in order. An error of that thread comes up with a later call.

    Args:
        folder: that holds them.
        keep: how many.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._unfinished: list[Future[None]] = []

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whose tensors nobody else may change, and remove those that are too many."""
        self.write(lambda: self._write(checkpoint))

    def write(self, function: Callable[[], None]) -> None:
        """Have the thread call a function that writes something else, before what is saved after it.

        Raises:
            OSError: something given before could not be written.
        """
        # what waits holds memory: two at most, such as the best weights and a checkpoint
        while len(self._unfinished) > 1 or (self._unfinished and self._unfinished[0].done()):
            self._unfinished.pop(0).result()
        self._unfinished.append(self._thread.submit(function))

    def close(self) -> None:
        """Return when all is on the disk, and end the thread.

        Raises:
            OSError: something could not be written.
        """
        try:
            while self._unfinished:
                self._unfinished.pop(0).result()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def _write(self, checkpoint: Checkpoint) -> None:
        path = self._folder / f"step-{checkpoint.step:08d}"
        partial = self._folder / f".{path.name}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
            write_tensors(partial / "model.safetensors", checkpoint.model)
            write_tensors(partial / "optimizer.safetensors", checkpoint.optimizer)
            content = {"step": checkpoint.step, **checkpoint.state}
            write_json(partial / "state.json", {**content, "sha256": _checksum(content)})
            sync_folder(partial)
            self._remove(path)  # one that was damaged, and the run came this way again
            os.rename(partial, path)
            sync_folder(self._folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            kept = [step for step, _ in self._found()]
            last = f"the last one is of step {kept[-1]}" if kept else "there is none"
            raise OSError(f"cannot write the checkpoint {path}: {error}; {last}") from error
        found = self._found()
        upto = [path for step, path in found if step <= checkpoint.step]
        # later ones are damaged, or the run would not have come this way again
        for superfluous in (*upto[: -self._keep], *(path for step, path in found if step > checkpoint.step)):
            self._remove(superfluous)

    def _remove(self, path: Path) -> None:
        if path.exists():
            # first out of sight: half a checkpoint must not look like one
            removed = self._folder / f".{path.name}.removed"
            shutil.rmtree(removed, ignore_errors=True)
            os.rename(path, removed)
            shutil.rmtree(removed, ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        """Steps and folders, oldest first."""
        entries = self._folder.iterdir() if self._folder.is_dir() else iter(())
        matches = ((_NAME.fullmatch(path.name), path) for path in entries)
        return sorted((int(match[1]), path) for match, path in matches if match)

    def latest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is not damaged, and what is wrong with newer ones.

        Raises:
            ValueError: there are some, and all are damaged.
        """
        wrong: list[str] = []
        for _, path in reversed(self._found()):
            try:
                return _read(path), wrong
            except (OSError, ValueError) as error:
                wrong.append(str(error))
        if wrong:
            raise ValueError(f"no checkpoint can be read: {'; '.join(wrong)}")
        return None, wrong

    def exist(self) -> bool:
        """Whether there are some, damaged ones too."""
        return bool(self._found())

    def clean(self) -> None:
        """Remove what processes left that were killed while they wrote."""
        if self._folder.is_dir():
            for path in self._folder.glob(".step-*"):
                shutil.rmtree(path, ignore_errors=True)


def _read(path: Path) -> Checkpoint:
    content = read_json(path / "state.json")
    expected = content.pop("sha256", None)
    if _checksum(content) != expected:
        raise ValueError(f"{path / 'state.json'} is damaged: its checksum is another")
    model, optimizer = (read_tensors(path / f"{name}.safetensors") for name in ("model", "optimizer"))
    return Checkpoint(content.pop("step"), model, optimizer, content)


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
