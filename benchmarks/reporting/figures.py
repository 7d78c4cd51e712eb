"""The figures of a report, as SVG that stands in its page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure as Canvas

from benchmarks.reporting import bars, ratios, rooflines, sweeps, units
from benchmarks.reporting.bars import Bar, Group
from benchmarks.reporting.plotting import color, style, svg
from benchmarks.reporting.rows import BASELINE, MODEL_SUITES, MODES, SUITES, Row, Run

SPEED_UP_CAPTION = (
    "Times as fast as eager PyTorch in the same case, by median time, on a logarithmic axis; bars to the left of "
    "1.00\N{MULTIPLICATION SIGN} are slower than eager. Whiskers: eager's p20 over the provider's p80, and the reverse."
)
MEMORY_CAPTION = "Peak device memory that the call allocates beyond its inputs."
MODEL_MEMORY_CAPTION = "Peak device memory."


@dataclass(frozen=True)
class Figure:
    """A figure and what it belongs to."""

    name: str
    suite: str
    title: str
    caption: str
    svg: str


def figures(run: Run) -> list[Figure]:
    """All figures for which a run has numbers, suite by suite."""
    found: list[Figure] = []
    names = list(dict.fromkeys(row.suite for row in run.rows))
    with style():
        for suite in names:
            rows = [row for row in run.rows if row.suite == suite]
            for kind, title, caption, drawn in _figures(run, suite, rows):
                name = f"{run.machine.slug}-{suite}-{kind}"
                full = f"{SUITES.get(suite, suite)}: {title}"
                found.append(Figure(name, suite, full, caption, svg(drawn, name, full)))
    return found


def _figures(run: Run, suite: str, rows: list[Row]) -> Iterator[tuple[str, str, str, Canvas]]:
    modes = list(dict.fromkeys(row.mode for row in rows))
    for mode in modes:
        of_mode = [row for row in rows if row.mode == mode]
        yield from _charts(
            f"speed-up-{mode}", _title("speed-up over eager", mode), SPEED_UP_CAPTION, of_mode, _speed_ups
        )
    for axis, name in (("T", "sequence length"), ("B", "batch size")):
        for mode in modes:
            drawn = sweeps.draw([row for row in rows if row.mode == mode], axis)
            if drawn is not None:
                yield f"by-{axis}-{mode}", _title(f"throughput by {name}", mode), sweeps.CAPTION, drawn
    if suite not in MODEL_SUITES:
        drawn = rooflines.draw(rows, run.machine)
        if drawn is not None:
            yield "roofline", "roofline", rooflines.caption(run.machine), drawn
    for mode in modes:
        of_mode = [row for row in rows if row.mode == mode]
        caption = MODEL_MEMORY_CAPTION if suite in MODEL_SUITES else MEMORY_CAPTION
        yield from _charts(f"memory-{mode}", _title("memory", mode), caption, of_mode, _memory)


def _title(what: str, mode: str) -> str:
    return what if mode in ("step", "generate") else f"{what}, {MODES.get(mode, mode)}"


def _charts(
    kind: str, title: str, caption: str, rows: list[Row], bars_of: Any
) -> Iterator[tuple[str, str, str, Canvas]]:
    """Bar charts of rows, as many as it takes for each to stay legible."""
    groups, options = bars_of(rows)
    parts = bars.split([group for group in groups if group.bars])
    for number, part in enumerate(parts, 1):
        several = f" ({number} of {len(parts)})" if len(parts) > 1 else ""
        yield f"{kind}-{number}", title + several, caption, bars.draw(part, **options)


def _speed_ups(rows: list[Row]) -> tuple[list[Group], dict[str, Any]]:
    groups = []
    for (_, case, _, _), providers in ratios.cases(rows).items():
        if BASELINE not in providers:
            continue
        drawn = []
        for name, row in providers.items():
            if name != BASELINE:
                ratio = ratios.Ratio(row, providers[BASELINE])
                fill = _color(row, units.is_loss(ratio.value))
                text = units.ratio(ratio.value).replace(units.LOSS, "slower")
                drawn.append(Bar(name, ratio.value, text, fill, ratio.low, ratio.high, strong=_ours(row)))
        groups.append(Group(case, tuple(drawn)))
    return groups, {"origin": 1.0, "log": True, "label": "times as fast as eager"}


def _memory(rows: list[Row]) -> tuple[list[Group], dict[str, Any]]:
    largest = max((row.peak_bytes or 0 for row in rows), default=0)
    scale, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    groups = [
        Group(
            case,
            tuple(
                Bar(name, row.peak_bytes / scale, units.size(row.peak_bytes), _color(row), strong=_ours(row))
                for name, row in providers.items()
                if row.peak_bytes is not None
            ),
        )
        for (_, case, _, _), providers in ratios.cases(rows).items()
    ]
    return groups, {"origin": 0.0, "log": False, "label": unit}


def _ours(row: Row) -> bool:
    return row.provider.startswith("triton")


def _color(row: Row, loss: bool = False) -> str:
    return color(("own" if _ours(row) else "peer") + ("-loss" if loss else ""))
