"""Numbers as a reader wants them: three digits and a unit that fits."""

from __future__ import annotations

import math

NOTHING = "—"
LOSS = "▼"
TIMES = "\N{MULTIPLICATION SIGN}"


def _scaled(value: float, steps: list[tuple[float, str]]) -> str:
    """`value` in the largest unit of which it is at least one, with about three digits."""
    for number, (size, unit) in enumerate(steps):
        if abs(value) >= size or number == len(steps) - 1:
            return f"{_digits(value / size)} {unit}"
    raise AssertionError("no units")


def _digits(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    decimals = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:,.{decimals}f}"


def seconds(value: float | None) -> str:
    """A time in s, ms or µs."""
    if value is None:
        return NOTHING
    return _scaled(value, [(1, "s"), (1e-3, "ms"), (1e-6, "µs")])


def size(value: float | None) -> str:
    """Bytes in GiB, MiB, KiB or B."""
    if value is None:
        return NOTHING
    if abs(value) < 2**10:
        return f"{value:.0f} B"
    return _scaled(value, [(2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")])


def bandwidth(value: float | None) -> str:
    """Bytes per second in GB/s."""
    return NOTHING if value is None else f"{_digits(value / 1e9)} GB/s"


def compute(value: float | None) -> str:
    """FLOP/s in TFLOP/s, or GFLOP/s if it is not even a tenth."""
    if value is None:
        return NOTHING
    return f"{_digits(value / 1e12)} TFLOP/s" if value >= 1e11 else f"{_digits(value / 1e9)} GFLOP/s"


def share(value: float | None) -> str:
    """A share in percent."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def count(value: float | None) -> str:
    """A whole number."""
    return NOTHING if value is None else f"{value:,.0f}"


def error(value: float | None) -> str:
    """A relative error."""
    return NOTHING if value is None else f"{value:.1e}"


def is_loss(value: float | None) -> bool:
    """Whether a ratio shows as less than 1.00."""
    return value is not None and round(value, 2) < 1


def ratio(value: float | None) -> str:
    """A ratio to two decimals; losses are marked with more than a colour."""
    if value is None:
        return NOTHING
    return f"{value:.2f}{TIMES}" + (f" {LOSS}" if is_loss(value) else "")
