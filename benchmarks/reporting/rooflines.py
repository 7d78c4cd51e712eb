"""Rooflines: what each kernel reaches, under the limits of the machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from benchmarks.reporting.plotting import color, legend, panels, provider_styles
from benchmarks.reporting.rows import MODES, Machine, Row


def caption(machine: Machine) -> str:
    """What the lines and points are."""
    peak = "" if machine.peak.name is None else f" Dashed: the data sheet of {machine.peak.name}."
    return (
        "Rate reached over arithmetic intensity, both axes logarithmic. The solid line is the least of copy bandwidth "
        f"and matrix rate, both measured at the beginning of the run.{peak}"
    )


def draw(rows: list[Row], machine: Machine) -> Canvas | None:
    """One panel for each mode and dtype; None if no row has the numbers."""
    rows = [row for row in rows if row.flops and row.bytes]
    if not rows:
        return None
    styles = provider_styles(row.provider for row in rows)
    keys = list(dict.fromkeys((row.dtype, row.mode) for row in rows))
    figure, all_axes = panels(len(keys), columns=2)
    for axes, (dtype, mode) in zip(all_axes, keys, strict=True):
        chosen = [row for row in rows if (row.dtype, row.mode) == (dtype, mode)]
        axes.set_title(f"{MODES.get(mode, mode)}, {dtype}")
        _draw_panel(axes, chosen, machine, styles)
    limits = [Line2D([], [], color=color("ink"), label="measured limits")]
    if machine.peak.name is not None:
        limits.append(Line2D([], [], color=color("muted"), linestyle=(0, (4, 3)), label="data sheet"))
    points = [Line2D([], [], **_point(name, styles), label=name) for name in styles]
    legend(figure, limits + points)
    return figure


def _draw_panel(axes: Any, rows: list[Row], machine: Machine, styles: Mapping[str, tuple[str, str]]) -> None:
    intensities = [(row.flops or 0) / (row.bytes or 1) for row in rows]
    rates = [(row.flops or 0) / row.seconds.median for row in rows]
    dtype = rows[0].dtype
    line = np.geomspace(min(intensities) / 3, max(intensities) * 3, 200)
    roof = _roof(line, machine.copy_bytes_per_second, machine.matrix_flops_per_second.get(dtype))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.plot(line, roof, color=color("ink"), linewidth=1.3, zorder=2)
    tops = [roof.max()]
    if machine.peak.bandwidth is not None:
        peak = _roof(line, machine.peak.bandwidth, machine.peak.flops.get(dtype))
        axes.plot(line, peak, color=color("muted"), linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
        tops.append(peak.max())
    for row, intensity, rate in zip(rows, intensities, rates, strict=True):
        axes.plot(intensity, rate, **_point(row.provider, styles))
    axes.set_xlim(line[0], line[-1])
    axes.set_ylim(min(rates) / 1.5, max(tops) * 1.25)
    axes.grid(which="major", linewidth=0.7)
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.set_xlabel("FLOP per byte")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: _rate(value))


def _point(provider: str, styles: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Hollow but for gptfast's: points often coincide."""
    fill, marker = styles[provider]
    own = provider.startswith("triton")
    face = fill if own else "none"
    return {"marker": marker, "color": fill, "markerfacecolor": face, "linestyle": "", "zorder": 3 if own else 4}


def _roof(intensity: np.ndarray, bandwidth: float, matrix: float | None) -> np.ndarray:
    slope = intensity * bandwidth
    return slope if matrix is None else np.minimum(slope, matrix)


def _rate(value: float) -> str:
    return f"{value / 1e12:g} TFLOP/s" if value >= 1e11 else f"{value / 1e9:g} GFLOP/s"
