"""Saving of a run: best weights, checkpoints, the batch of a failed step and the summary."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from gptfast.checkpoint.manager import CheckpointManager
from gptfast.checkpoint.run_folder import RunFolder
from gptfast.training.progress import plot_losses
from gptfast.training.train_state import TrainState


class Saver:
    """Saves a run. A thread writes the files while training continues.

    With FSDP saving gathers parameters and is collective: every rank must call it. Ranks other than 0 have no `folder`
    and write nothing.

    Attributes:
        best: metrics of the best evaluation so far; its losses are None before the first.
        seconds: total time that training has waited for saving.
    """

    def __init__(
        self,
        state: TrainState,
        path: Path,
        folder: RunFolder | None,
        checkpoints: CheckpointManager,
        best: dict[str, Any],
        fingerprints: dict[str, str],
    ) -> None:
        self.path, self.best, self.seconds = path, best, 0.0
        self._state, self._folder, self._fingerprints = state, folder, fingerprints
        self._checkpoints = checkpoints
        self._takes_part = folder is not None or state.is_sharded

    def save_if_best(self, metrics: dict[str, Any]) -> None:
        """Save the weights if the validation loss is the lowest so far."""
        if self.best["val_loss"] is not None and metrics["val_loss"] >= self.best["val_loss"]:
            return
        self.best = metrics
        if not self._takes_part:
            return
        started = time.perf_counter()
        files = self._state.files()
        if self._folder is not None:
            for name, tensors in files.items():
                self._checkpoints.submit(functools.partial(self._folder.write_tensors, name, tensors))
        self.seconds += time.perf_counter() - started

    def save_checkpoint(self, step: int) -> None:
        """Save all that is needed to continue after `step` steps."""
        if not self._takes_part:
            return
        started = time.perf_counter()
        checkpoint = self._state.checkpoint(step, {"best": self.best, "data": self._fingerprints})
        if self._folder is not None:
            self._checkpoints.save(checkpoint)
        self.seconds += time.perf_counter() - started

    def save_failure(self, failure: dict[str, Any], batch: dict[str, Tensor]) -> str:
        """Save a step whose loss or gradient is not finite; return the end of the error message."""
        if self._folder is None:
            return ""
        self._folder.write_tensors("failed-batch.safetensors", batch)
        self._folder.write_json("failed-step.json", failure)
        return f"; its batch is in {self.path / 'failed-batch.safetensors'}"

    def save_summary(self, summary: dict[str, Any]) -> None:
        """Plot the losses and, unless the run was interrupted, write `summary.json`."""
        if self._folder is None:
            return
        plot_losses(self.path)
        if not summary["interrupted"]:
            self._folder.write_json("summary.json", summary)

    def close(self) -> None:
        """Wait until everything is on disk, and stop the thread; raise OSError if a write failed."""
        self._checkpoints.close()
