"""The benchmarks' commands, and the processes that they start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tyro

from benchmarks.measuring.bench import WrongResultError


class RunError(RuntimeError):
    """A run that failed, or whose output belongs to another run than the requested one."""


@contextmanager
def exit_on_error(module: str) -> Iterator[None]:
    """End the process with one line on stderr after an expected failure.

    The exit status is 2 for a ValueError (arguments, or a machine without what is needed), 1 for a failed run, a wrong
    result or a file, and 130 for an interrupt.
    """
    try:
        yield
    except (ValueError, OSError, RunError, WrongResultError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        print(f"{module}: interrupted", file=sys.stderr)
        sys.exit(130)


def run_command(main: Callable[..., None], module: str, arguments: Sequence[str] | None = None) -> None:
    """Call `main` with arguments, by default of the process, which tyro reads by its signature and docstring.

    `module` is the command's name in help and errors, such as "benchmarks.tune"; see `exit_on_error` for failures.
    """
    with exit_on_error(module):
        tyro.cli(main, prog=f"python -m {module}", args=arguments)


def require_known(kind: str, name: str, accepted: Iterable[str]) -> None:
    """Raise ValueError unless the name is one of `accepted`."""
    if name not in (known := list(accepted)):
        raise ValueError(f"unknown {kind} {name!r}; accepted: {', '.join(known)}")


def require_positive(**values: int) -> None:
    """Raise ValueError unless all values of command-line options are at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def run_process(name: str, command: Sequence[str], folder: Path, threads: int | None = None) -> tuple[str, float]:
    """Run a program in `folder`, on `threads` threads if given, and return its output and its seconds.

    Raises:
        RunError: the exit status of `name` is not 0; the message has its last lines.
    """
    limits = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | limits,
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
