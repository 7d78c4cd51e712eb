"""Figures of a suite: speed-ups and memory as bars, throughput by size as lines, and rooflines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from pandas import DataFrame

from benchmarks.reporting import ratios, units
from benchmarks.reporting.names import MAIN, MODEL_SUITES, MODES, SUITES, title
from benchmarks.reporting.plotting import WIDTH, color, legend, panels, provider_styles, style, svg
from benchmarks.reporting.results import Machine, Results

BARS = 40  # in a chart, about
_ROW, _LEFT, _RIGHT, _TOP, _BOTTOM = 0.21, 1.95, 0.15, 0.1, 0.5  # inches


@dataclass(frozen=True)
class Figure:
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
        base = ratios.baseline(of_mode)
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
    rows = ratios.add_ratios(rows, ratios.of_provider(rows, base)).dropna(subset="ratio")
    rows = rows[rows["provider"] != base]
    loss = rows["ratio"].map(units.is_slower).map({True: "-loss", False: ""})
    texts = [units.ratio(ratio).replace(units.SLOWER, "slower") for ratio in rows["ratio"]]
    return rows.assign(value=rows["ratio"], text=texts, color=_colors(rows) + loss)


def _memory(rows: DataFrame) -> DataFrame:
    rows = rows.dropna(subset="peak_bytes")
    scale, unit = (2**30, "GiB") if rows["peak_bytes"].max() >= 2**30 else (2**20, "MiB")
    rows = rows.assign(value=rows["peak_bytes"] / scale, low=None, high=None, unit=unit)
    return rows.assign(text=rows["peak_bytes"].map(units.size), color=_colors(rows))


def _colors(rows: DataFrame) -> pd.Series:
    return rows["provider"].str.startswith(MAIN).map({True: "own", False: "peer"})


def split_bars(rows: DataFrame) -> Iterator[tuple[int, str, DataFrame]]:
    """Divide bars between cases into charts of about the same size; number, suffix of the title and rows of each."""
    charts = math.ceil(len(rows) / BARS)
    position = pd.Series(np.arange(len(rows)) + 0.5, rows.index)
    middle = position.groupby(rows["case"]).transform("mean")
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
    height = (len(rows) + 1.4 * is_first.sum()) * _ROW + _TOP + _BOTTOM
    left = max(_LEFT, 0.2 + 0.072 * rows["provider"].str.len().max())
    width = WIDTH - left - _RIGHT
    canvas = Canvas(figsize=(WIDTH, height))
    axes = canvas.add_axes((left / WIDTH, _BOTTOM / height, width / WIDTH, 1 - (_TOP + _BOTTOM) / height))
    low, high = (rows[end].fillna(rows["value"]).astype(float) for end in ("low", "high"))
    _set_limits(axes, min(origin, low.min()), max(origin, high.max()), width, log=origin > 0)
    axes.barh(y, rows["value"] - origin, left=origin, height=0.74, color=rows["color"].map(color), zorder=2)
    if (high > low).any():
        whiskers: dict[str, Any] = {"color": color("ink"), "elinewidth": 0.9, "capsize": 2.6, "zorder": 4}
        axes.errorbar(rows["value"], y, xerr=(rows["value"] - low, high - rows["value"]), fmt="none", **whiskers)
    axes.axvline(origin, color=color("ink"), linewidth=1.1, zorder=3)
    axes.set(ylim=(y[-1] + 0.6, 0), xlabel=label)
    axes.set_yticks(y, rows["provider"], color=color("ink"), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    at_left: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "xytext": (2 - 72 * left, 0)}
    for heading, place in zip(rows["case"][is_first], y[is_first] - 0.95, strict=True):
        axes.annotate(heading, (0, place), textcoords="offset points", va="center", fontweight="bold", **at_left)
    for place, least, most, name, row in zip(y, low, high, axes.get_yticklabels(), rows.itertuples(), strict=True):
        name.set_fontweight("bold" if row.color.startswith("own") else "normal")
        end, offset, side = (least, -4, "right") if row.value < origin else (most, 4, "left")
        look: dict[str, Any] = {"fontsize": 8.5, "fontweight": name.get_fontweight(), "ha": side, "va": "center"}
        axes.annotate(row.text, (end, place), (offset, 0), textcoords="offset points", **look)
    return canvas


def _set_limits(axes: Any, low: float, high: float, width: float, log: bool) -> None:
    """Leave room for the numbers at the ends of the bars; `width` is in inches."""
    if not log:
        axes.set_xlim(0, high * width / (width - 0.8) or 1)
        return
    left, right = (1.0 if low < 1 else 0.1), 0.8
    inch = math.log(max(high / low, 1.2)) / (width - left - right)
    low, high = low / math.exp(left * inch), high * math.exp(right * inch)
    axes.set(xscale="log", xlim=(low, high))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high / low > 8 else MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}{units.TIMES}")


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


def draw_sweeps(rows: DataFrame, label: str) -> Canvas:
    """Draw lines of throughput over the `size` of each row."""
    scale, unit = (1e3, "thousand tokens/s") if rows["suite"].isin(MODEL_SUITES).all() else (1e12, "TFLOP/s")
    styles = provider_styles(rows["provider"])
    canvas, drawn = panels(rows.groupby("panel", sort=False))
    for axes, panel in drawn:
        for provider, line in panel.sort_values("size").groupby("provider", sort=False):
            fill, marker = styles[provider]
            middle, median = line["throughput"] / scale, line["median"]
            spans = (middle * (1 - median / line["p80"]), middle * (median / line["p20"] - 1))
            look = {"color": fill, "marker": marker, "zorder": 4 if provider.startswith(MAIN) else 3}
            axes.errorbar(line["size"], middle, spans, elinewidth=0.9, **look)
        axes.set(xscale="log", ylim=(0, panel["throughput"].max() / scale * 1.08), xlabel=label, ylabel=unit)
        ticks = sorted(set(panel["size"]))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="y")
    legend(canvas, [Line2D([], [], color=fill, marker=marker, label=name) for name, (fill, marker) in styles.items()])
    return canvas


def draw_roofline(rows: DataFrame, machine: Machine) -> Canvas:
    """Draw rates over arithmetic intensity under the limits of the machine, one panel for each dtype and mode."""
    rows = rows.assign(intensity=rows["flops"] / rows["bytes"], rate=rows["flops"] / rows["median"])
    rows = rows[(rows["intensity"] > 0) & np.isfinite(rows["intensity"])]
    titles = rows["mode"].map(lambda mode: MODES.get(mode, mode)) + ", " + rows["dtype"]
    canvas, drawn = panels(rows.groupby(titles, sort=False))
    styles, limits, peak = provider_styles(rows["provider"]), machine.limits, machine.peak
    solid: dict[str, Any] = {"label": "measured limits", "color": color("ink")}
    dashed: dict[str, Any] = {"label": "data sheet", "color": color("muted"), "linestyle": (0, (4, 3))}
    roofs = [(limits.copy_bytes_per_second, limits.matrix_flops_per_second, solid)]
    if peak.bandwidth is not None:
        roofs.append((peak.bandwidth, peak.flops or {}, dashed))
    for axes, panel in drawn:
        x = np.geomspace(panel["intensity"].min() / 3, panel["intensity"].max() * 3, 200)
        tops = []
        for bandwidth, flops, look in roofs:
            roof = np.minimum(x * bandwidth, flops.get(panel["dtype"].iloc[0], math.inf))
            axes.plot(x, roof, zorder=2, **look)
            tops.append(roof.max())
        for provider, points in panel.groupby("provider", sort=False):
            axes.plot(points["intensity"], points["rate"], **_point(provider, styles))
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte")
        axes.set(xlim=(x[0], x[-1]), ylim=(panel["rate"].min() / 1.5, max(tops) * 1.25))
        axes.grid()
        for scale, text in ((axes.xaxis, "{:g}".format), (axes.yaxis, units.compute)):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_minor_locator(NullLocator())
            scale.set_major_formatter(lambda value, _, text=text: text(value))
    lines = [Line2D([], [], **look) for _, _, look in roofs]
    legend(canvas, [*lines, *(Line2D([], [], label=name, **_point(name, styles)) for name in styles)])
    return canvas


def _point(provider: str, styles: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Look of a point, hollow except for gptfast's: points often coincide."""
    fill, marker = styles[provider]
    face, above = (fill, 3) if provider.startswith(MAIN) else ("none", 4)
    return {"color": fill, "marker": marker, "markerfacecolor": face, "linestyle": "", "zorder": above}
