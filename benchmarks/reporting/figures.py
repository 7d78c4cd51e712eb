"""Figures of a suite: speed-ups and memory as bars, throughput by size as lines, and rooflines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import blended_transform_factory
from pandas import DataFrame, Series

from benchmarks.reporting import tables, units
from benchmarks.reporting.names import MAIN, MODEL_SUITES, MODES, SUITES, title
from benchmarks.reporting.plotting import WIDTH, color, provider_styles, style, svg
from benchmarks.reporting.results import Machine, Results

BARS = 40  # in a chart, about


class Figure(NamedTuple):
    """A figure for a page; `name` is unique in a report, `kind` is speed-up, sweep, roofline or memory."""

    name: str
    kind: str
    title: str
    svg: str


def figures(run: Results, suite: str) -> list[Figure]:
    """Draw all figures that a suite has numbers for."""
    found = []
    with style():
        for kind, part, heading, canvas in _drawings(run.rows[run.rows["suite"] == suite], run.machine):
            name = f"{run.machine.slug}-{suite}-{kind}{part}"
            found.append(Figure(name, kind, heading, svg(canvas, name, heading)))
    return found


def _drawings(rows: DataFrame, machine: Machine) -> Iterator[tuple[str, str, str, Canvas]]:
    """Kind, suffix of the name, title and canvas of a suite's figures."""
    suite = rows["suite"].iloc[0]
    modes = [(mode, title(suite, mode), of_mode) for mode, of_mode in rows.groupby("mode", sort=False)]
    for mode, heading, of_mode in modes:
        base = tables.baseline(of_mode)
        for part, of, bars in split_bars(_speed_ups(of_mode, base)):
            canvas = draw_bars(bars, 1.0, f"times as fast as {base}")
            yield "speed-up", f"-{mode}-{part}", f"{heading}: speed-up over {base}{of}", canvas
    for axis, size in (("T", "sequence length"), ("B", "batch size")):
        for mode, heading, of_mode in modes:
            if len(lines := sweeps(of_mode, axis)):
                canvas = draw_sweeps(lines, f"{size} {axis}")
                yield "sweep", f"-{axis}-{mode}", f"{heading}: throughput by {size}", canvas
    if suite not in MODEL_SUITES and (rows["flops"] * rows["bytes"] > 0).any():
        yield "roofline", "", f"{SUITES.get(suite, suite)}: roofline", draw_roofline(rows, machine)
    for mode, heading, of_mode in modes:
        for part, of, bars in split_bars(_memory(of_mode)):
            canvas = draw_bars(bars, 0.0, bars["unit"].iloc[0])
            yield "memory", f"-{mode}-{part}", f"{heading}: memory{of}", canvas


def _speed_ups(rows: DataFrame, base: str) -> DataFrame:
    rows = tables.add_ratios(rows, rows[rows["provider"] == base]).dropna(subset="ratio")
    rows = rows[rows["provider"] != base]
    loss = rows["ratio"].map(units.is_slower).map({True: "-loss", False: ""})
    texts = [units.ratio(ratio).replace(units.SLOWER, "slower") for ratio in rows["ratio"]]
    return rows.assign(value=rows["ratio"], text=texts, color=_colors(rows) + loss)


def _memory(rows: DataFrame) -> DataFrame:
    rows = rows.dropna(subset="peak_bytes")
    scale, unit = (2**30, "GiB") if rows["peak_bytes"].max() >= 2**30 else (2**20, "MiB")
    value = rows["peak_bytes"] / scale
    return rows.assign(
        value=value, low=value, high=value, unit=unit, text=rows["peak_bytes"].map(units.size), color=_colors(rows)
    )


def _colors(rows: DataFrame) -> Series:
    return rows["provider"].str.startswith(MAIN).map({True: "own", False: "peer"})


def split_bars(rows: DataFrame) -> Iterator[tuple[int, str, DataFrame]]:
    """Divide bars between cases into charts of about the same size; number, suffix of the title and rows of each."""
    charts = math.ceil(len(rows) / BARS)
    middle = Series(np.arange(len(rows)) + 0.5, rows.index).groupby(rows["case"]).transform("mean")
    for chart, part in rows.groupby((middle * charts / max(len(rows), 1)).astype(int)):
        yield chart + 1, f" ({chart + 1} of {charts})" if charts > 1 else "", part


def draw_bars(rows: DataFrame, origin: float, label: str) -> Canvas:
    """Draw horizontal bars by case, each with its name and number, so that no legend is needed.

    Args:
        rows: with `value`, `text`, `color` and the whiskers' ends `low` and `high`.
        origin: start of the bars; the axis is logarithmic unless it is 0.
        label: label of the axis.
    """
    is_first = ~rows["case"].duplicated()
    y = np.arange(len(rows)) + 1.4 * is_first.cumsum().to_numpy() + 0.4
    height = 0.21 * (y[-1] + 0.6) + 0.6  # inches
    left = max(1.95, 0.2 + 0.072 * rows["provider"].str.len().max())
    canvas = Canvas(figsize=(WIDTH, height))
    axes = canvas.subplots()
    canvas.subplots_adjust(left / WIDTH, 0.5 / height, 1 - 0.15 / WIDTH, 1 - 0.1 / height)
    ends = None if rows["low"].equals(rows["high"]) else (rows["value"] - rows["low"], rows["high"] - rows["value"])
    whiskers: dict[str, Any] = {"color": color("ink"), "ecolor": color("ink"), "elinewidth": 0.9, "capsize": 2.6}
    colors = rows["color"].map(color)
    bars = axes.barh(y, rows["value"] - origin, left=origin, height=0.74, xerr=ends, error_kw=whiskers, color=colors)
    axes.axvline(origin, color=color("ink"), linewidth=1.1)
    axes.set(ylim=(y[-1] + 0.6, 0), xlabel=label)
    axes.margins(x=0.2)  # room for the numbers at the ends of the bars
    if origin > 0:
        axes.update_datalim([(0.95, 1), (1.1, 1)])  # noise does not fill the chart
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{units.TIMES}")
    low, high = axes.get_xlim()
    is_wide = origin > 0 and high / low > 12
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.set_yticks(y, rows["provider"], color=color("ink"), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    beside = blended_transform_factory(canvas.transFigure, axes.transData)
    for case, place in zip(rows["case"][is_first], y[is_first] - 0.95, strict=True):
        axes.text(0.003, place, case, transform=beside, va="center", fontweight="bold")
    numbers = axes.bar_label(bars, rows["text"], padding=4, fontsize=8.5)
    for name, number, own in zip(axes.get_yticklabels(), numbers, rows["color"].str.startswith("own"), strict=True):
        name.set_fontweight("bold" if own else "normal")
        number.set_fontweight("bold" if own else "normal")
    return canvas


def sweeps(rows: DataFrame, axis: str) -> DataFrame:
    """Rows that form lines of two or more points over the size `axis`, "T" or "B", with their `panel` and `size`.

    The other sizes are fixed within a panel. With T, B*T may be fixed instead of B if that gives a longer line.
    """
    rows = rows[[isinstance(dims.get(axis), int) for dims in rows["dims"]]]
    ways = [_with_panels(rows, axis, fixed_tokens=False)]
    if axis == "T" and all(isinstance(dims.get("B"), int) for dims in rows["dims"]):
        ways.append(_with_panels(rows, axis, fixed_tokens=True))
    return max(ways, key=lambda way: way.groupby(["panel", "provider"]).size().max() if len(way) else 0)


def _with_panels(rows: DataFrame, axis: str, fixed_tokens: bool) -> DataFrame:
    """Rows of lines with at least two points; a panel is named after its fixed sizes."""

    def fixed_sizes(row: Any) -> str:
        fixed = {name: size for name, size in row.dims.items() if name != axis}
        if fixed_tokens:
            fixed = {"B\N{MIDDLE DOT}T": fixed.pop("B") * row.dims["T"]} | fixed
            if row.suite not in MODEL_SUITES:
                fixed.pop("H", None)  # it follows from D at a fixed width
        sizes = [size if name == "model" else f"{name} = {size}" for name, size in fixed.items()]
        return ", ".join([*sizes, row.dtype])

    speed = rows["tokens_per_second"].where(rows["suite"].isin(MODEL_SUITES), rows["flops_per_second"])
    panel, size = [fixed_sizes(row) for row in rows.itertuples()], [dims[axis] for dims in rows["dims"]]
    rows = rows.assign(panel=panel, size=size, throughput=speed).dropna(subset="throughput")
    return rows[rows.groupby(["panel", "provider"])["size"].transform("nunique") >= 2]


def _panels(groups: Any) -> tuple[Canvas, list[tuple[Any, DataFrame]]]:
    """Create a figure of two panels a row with the titles of `groups`, a pandas grouping; axes and rows of each."""
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    canvas = Canvas(figsize=(WIDTH, 3.0 * lines + 0.5), layout="constrained")
    found = enumerate(groups, 1)
    return canvas, [(canvas.add_subplot(lines, columns, at, title=name), rows) for at, (name, rows) in found]


def _legend(canvas: Canvas, lines: dict[str, Any]) -> None:
    """Draw one legend above all panels, in as many columns as fit."""
    columns = max(1, min(len(lines), int(WIDTH / (0.6 + 0.075 * max(map(len, lines))))))
    look: dict[str, Any] = {"ncols": columns, "handlelength": 1.8, "columnspacing": 1.4}
    canvas.legend(lines.values(), lines.keys(), loc="outside upper left", **look)


def draw_sweeps(rows: DataFrame, label: str) -> Canvas:
    """Draw lines of throughput over the `size` of each row."""
    scale, unit = (1e3, "thousand tokens/s") if rows["suite"].isin(MODEL_SUITES).all() else (1e12, "TFLOP/s")
    styles = provider_styles(rows["provider"])
    canvas, panels = _panels(rows.groupby("panel", sort=False))
    lines = {}
    for axes, panel in panels:
        for provider, points in panel.sort_values("size").groupby("provider", sort=False):
            middle, median = points["throughput"] / scale, points["median"]
            spans = (middle * (1 - median / points["p80"]), middle * (median / points["p20"] - 1))
            look: dict[str, Any] = styles[provider] | {"zorder": 4 if provider.startswith(MAIN) else 3}
            lines[provider] = axes.errorbar(points["size"], middle, spans, elinewidth=0.9, **look)
        axes.set(xscale="log", ylim=(0, panel["throughput"].max() / scale * 1.08), xlabel=label, ylabel=unit)
        ticks = sorted(set(panel["size"]))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y")
    _legend(canvas, lines)
    return canvas


def draw_roofline(rows: DataFrame, machine: Machine) -> Canvas:
    """Draw rates over arithmetic intensity under the limits of the machine, one panel for each dtype and mode."""
    rows = rows.assign(intensity=rows["flops"] / rows["bytes"], rate=rows["flops"] / rows["median"])
    rows = rows[(rows["intensity"] > 0) & np.isfinite(rows["intensity"])]
    styles = provider_styles(rows["provider"])
    roofs: dict[str, Any] = {"measured limits": (machine.copy_rate, machine.matmul_rates, color("ink"), "-")}
    if machine.peak_bandwidth is not None:
        roofs["data sheet"] = (machine.peak_bandwidth, machine.peak_rates or {}, color("muted"), (0, (4, 3)))
    names = rows["mode"].map(lambda mode: MODES.get(mode, mode)) + ", " + rows["dtype"]
    canvas, panels = _panels(rows.groupby(names, sort=False))
    lines = {}
    for axes, panel in panels:
        x = np.geomspace(panel["intensity"].min() / 3, panel["intensity"].max() * 3, 200)
        tops = []
        for name, (bandwidth, flops, ink, dashes) in roofs.items():
            roof = np.minimum(x * bandwidth, flops.get(panel["dtype"].iloc[0], math.inf))
            (lines[name],) = axes.plot(x, roof, color=ink, linestyle=dashes, zorder=2)
            tops.append(roof.max())
        for provider, points in panel.groupby("provider", sort=False):
            # hollow except for gptfast's: points often coincide
            above: dict[str, Any] = {"zorder": 3} if provider.startswith(MAIN) else {"zorder": 4, "mfc": "none"}
            look = styles[provider] | above
            (lines[provider],) = axes.plot(points["intensity"], points["rate"], linestyle="", **look)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte")
        axes.set(xlim=(x[0], x[-1]), ylim=(panel["rate"].min() / 1.5, max(tops) * 1.25))
        axes.grid()
        for scale, text in ((axes.xaxis, "{:g}".format), (axes.yaxis, units.compute)):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_minor_locator(NullLocator())
            scale.set_major_formatter(lambda value, _, text=text: text(value))
    _legend(canvas, lines)
    return canvas
