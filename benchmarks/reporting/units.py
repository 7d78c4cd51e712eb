"""Formatters of numbers: three digits with a unit that fits. A missing number, None or NaN, is a dash."""

from __future__ import annotations

import math
from collections.abc import Callable

NOTHING = "—"
SLOWER = "▼"
TIMES = "\N{MULTIPLICATION SIGN}"

Formatter = Callable[[float | None], str]


def is_slower(ratio: float) -> bool:
    """True if a ratio of speeds shows as less than 1.00."""
    return round(ratio, 2) < 1


def _optional(text: Callable[[float], str]) -> Formatter:
    return lambda value: NOTHING if value is None or math.isnan(value) else text(value)


def _in_units(units: dict[str, float]) -> Formatter:
    """Format in the largest unit that leaves the number at least one, else in the smallest."""

    def text(value: float) -> str:
        unit = next((unit for unit, scale in units.items() if abs(value) >= scale), list(units)[-1])
        value /= units[unit]
        decimals = 0 if abs(value) >= 99.95 or unit == "B" else 1 if abs(value) >= 9.995 else 2
        return f"{value:,.{decimals}f} {unit}"

    return _optional(text)


seconds = _in_units({"s": 1, "ms": 1e-3, "µs": 1e-6})
size = _in_units({"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1})
bandwidth = _in_units({"GB/s": 1e9})
compute = _in_units({"TFLOP/s": 1e12, "GFLOP/s": 1e9})
share = _optional(lambda value: f"{100 * value:.1f} %")
count = _optional("{:,.0f}".format)
error = _optional("{:.1e}".format)
# ▼ marks a slower case, so that colour is not the only mark
ratio = _optional(lambda value: f"{value:.2f}{TIMES}" + (f" {SLOWER}" if is_slower(value) else ""))
