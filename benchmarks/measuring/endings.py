"""How commands that train end: with a line for people where something went wrong, and a status that says what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def told_in_a_line(module: str) -> Iterator[None]:
    """End the process, with the error behind `module`'s name, where what is within fails.

    Exit status 2 for a ValueError, what cannot be measured, 1 for a run or a file that fails, 130 for an interrupt.
    """
    try:
        yield
    except ValueError as error:
        _exit(2, f"{module}: {error}")
    except (OSError, RuntimeError) as error:
        _exit(1, f"{module}: {error}")
    except KeyboardInterrupt:
        _exit(130, f"{module}: interrupted")


def _exit(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)
