"""Signals that interrupt a training run after its current step."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupts:
    """Context manager that records SIGINT (Ctrl-C) and SIGTERM, which would end the process.

    A second SIGINT raises KeyboardInterrupt at once; SIGTERM, which process managers repeat, never does.

    Attributes:
        requested: True once a signal has arrived.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
