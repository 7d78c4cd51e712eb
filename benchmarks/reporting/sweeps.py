"""Throughput against a size: the sequence length T or the batch B."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from benchmarks.reporting.plotting import legend, panels, provider_styles
from benchmarks.reporting.rows import MODEL_SUITES, Row

CAPTION = "Medians; bars at the points span p20 to p80. What is held fixed stands above each panel."

Panel = tuple[str, str]
Series = dict[str, dict[float, Row]]


def draw(rows: list[Row], axis: str) -> Canvas | None:
    """Lines of throughput over the size named `axis`; None unless there are two points for a line."""
    rows = [row for row in rows if isinstance(row.dims.get(axis), int) and _throughput(row) is not None]
    found = sweeps(rows, axis)
    if not found:
        return None
    styles = provider_styles(row.provider for row in rows)
    figure, all_axes = panels(len(found), columns=2)
    for axes, (title, series) in zip(all_axes, found.items(), strict=True):
        axes.set_title(title)
        _draw_panel(axes, series, axis, styles)
    shown = {provider for series in found.values() for provider in series}
    handles = [
        Line2D([], [], color=fill, marker=marker, label=name)
        for name, (fill, marker) in styles.items()
        if name in shown
    ]
    legend(figure, handles)
    return figure


def sweeps(rows: Iterable[Row], axis: str) -> dict[str, Series]:
    """Lines of at least two points by what is held fixed: all other sizes, or with T also B*T in place of B.

    Of the two ways to vary T, the one that gives the longest line is taken, the first one if they are equal.
    """
    rows = list(rows)
    ways = [_panels(rows, axis, tokens=False)]
    if axis == "T" and all(isinstance(row.dims.get("B"), int) for row in rows):
        ways.append(_panels(rows, axis, tokens=True))
    return max(ways, key=lambda way: max((len(line) for series in way.values() for line in series.values()), default=0))


def _panels(rows: list[Row], axis: str, tokens: bool) -> dict[str, Series]:
    grouped: dict[str, Series] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        fixed: dict[str, Any] = {name: size for name, size in row.dims.items() if name != axis}
        if tokens:
            fixed = {"B\N{MIDDLE DOT}T": int(row.dims["B"]) * int(row.dims["T"])} | fixed
            del fixed["B"]
            if row.suite not in MODEL_SUITES:
                fixed.pop("H", None)  # it goes with D: the width is the same
        title = ", ".join(str(size) if name == "model" else f"{name} = {size}" for name, size in fixed.items())
        grouped[f"{title}, {row.dtype}"][row.provider][float(row.dims[axis])] = row
    result = {
        title: {provider: dict(sorted(line.items())) for provider, line in series.items() if len(line) >= 2}
        for title, series in grouped.items()
    }
    return {title: series for title, series in result.items() if series}


def _throughput(row: Row) -> float | None:
    return row.tokens_per_second if row.suite in MODEL_SUITES else row.flops_per_second


def _draw_panel(axes: Any, series: Series, axis: str, styles: Mapping[str, tuple[str, str]]) -> None:
    model = any(row.suite in MODEL_SUITES for line in series.values() for row in line.values())
    scale, unit = (1e3, "thousand tokens/s") if model else (1e12, "TFLOP/s")
    ticks = sorted({size for line in series.values() for size in line})
    top = 0.0
    for provider, line in series.items():
        fill, marker = styles[provider]
        middle = [(_throughput(row) or 0) / scale for row in line.values()]
        lows = [
            value * (1 - row.seconds.median / row.seconds.p80) for value, row in zip(middle, line.values(), strict=True)
        ]
        highs = [
            value * (row.seconds.median / row.seconds.p20 - 1) for value, row in zip(middle, line.values(), strict=True)
        ]
        above = 4 if provider.startswith("triton") else 3
        axes.errorbar(list(line), middle, (lows, highs), color=fill, marker=marker, elinewidth=0.9, zorder=above)
        top = max(top, *middle)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, top * 1.08)
    axes.grid(axis="y", linewidth=0.7)
    axes.set_xlabel({"T": "sequence length T", "B": "batch size B"}[axis])
    axes.set_ylabel(unit)
