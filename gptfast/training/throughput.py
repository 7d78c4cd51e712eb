"""Throughput of training steps."""

from __future__ import annotations

import time

from gptfast import flops


class Throughput:
    """Meter of tokens per second and MFU, which leaves out set-up, evaluations and checkpoints.

    Args:
        tokens_per_step: tokens of a step, over all processes.
        roofline: tokens per second at the peak FLOP/s of all devices; None if the peak is unknown.
    """

    def __init__(self, tokens_per_step: int, roofline: float | None) -> None:
        self._tokens_per_step, self.roofline = tokens_per_step, roofline
        self._tokens, self._seconds, self._started = 0, 0.0, 0.0

    def start(self) -> None:
        """Start an interval of training steps."""
        self._started = time.perf_counter()

    def stop(self, steps: int, warmup: bool = False) -> float:
        """End an interval and return its tokens per second. The average leaves out intervals of warm-up."""
        seconds, tokens = time.perf_counter() - self._started, steps * self._tokens_per_step
        if not warmup:
            self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        return tokens / seconds

    @property
    def average(self) -> float | None:
        """Tokens per second of all intervals together; None before the first."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOPs utilisation at a speed, a fraction; None if the speed or the peak is unknown."""
        return None if tokens_per_second is None else flops.utilisation(tokens_per_second, self.roofline)
