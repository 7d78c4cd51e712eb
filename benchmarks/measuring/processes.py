"""Runs of training programs: processes that are waited for."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


class RunError(RuntimeError):
    """A run that failed, or whose output says that it was another one than was asked for."""


def finished(name: str, command: Sequence[str], folder: Path, threads: int | None = None) -> tuple[str, float]:
    """What a process printed, and its seconds.

    Args:
        name: what errors call it.
        command: the program and its arguments.
        folder: where it runs.
        threads: for its arithmetic; None leaves PyTorch's default.

    Raises:
        RunError: its exit status is not 0; the message has its last lines.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-8:]
        raise RunError("\n    ".join([f"{name} failed with exit status {done.returncode}; its last lines:", *last]))
    return done.stdout, seconds
