"""Runs the commands of the documentation."""

import os
import shlex
import subprocess
import sys
from pathlib import Path


def words(command: str) -> list[str]:
    """Translate a command to this interpreter's modules: its scripts may not be on the path."""
    first, *rest = shlex.split(command)
    module = {"torchrun": "torch.distributed.run"}.get(first, first)
    return [sys.executable, *rest] if first == "python" else [sys.executable, "-m", module, *rest]


def run(command: list[str], folder: Path) -> str:
    """Run a command, which must succeed; returns its standard output."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
