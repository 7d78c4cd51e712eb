"""Losses of several runs in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator

from benchmarks.reporting import plotting

_STYLES = (("eager", "-", 3.0), ("triton", "-", 1.2), ("series-2", "--", 1.2), ("series-1", ":", 1.6))


def differences(run: dict[str, Any], first: dict[str, Any]) -> list[tuple[int, float]]:
    """Step, and how far a run's validation loss is above that of the first, at all evaluations that both have."""
    theirs = {entry["step"]: entry["val_loss"] for entry in first["evaluations"]}
    return [
        (entry["step"], entry["val_loss"] - theirs[entry["step"]])
        for entry in run["evaluations"]
        if entry["step"] in theirs
    ]


def draw(content: dict[str, Any], path: Path) -> None:
    """Write a PNG: the validation losses and, below, how far they are above the first run's."""
    first = content["runs"][0]
    with plotting.style():
        figure = plotting.canvas(5.6)
        figure.set_layout_engine("constrained")
        figure.set_facecolor("white")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for number, run in enumerate(content["runs"]):
            name, line, width = _STYLES[number % len(_STYLES)]
            look: dict[str, Any] = {"color": plotting.color(name), "linestyle": line, "linewidth": width}
            points = [(entry["step"], entry["val_loss"]) for entry in run["evaluations"]]
            above.plot(*zip(*points, strict=True), label=run["label"], **look)
            if run is not first:
                below.plot(*zip(*differences(run, first), strict=True), marker=".", **look)
        below.axhline(0.0, color=plotting.color("eager"), linewidth=3.0, zorder=1.6)  # above the grid
        above.set(ylabel="validation loss (nats per token)", title=f"{content['recipe']} by {content['option']}")
        below.set(xlabel="step", ylabel=f"above {first['label']}")
        below.yaxis.set_major_formatter("{x:+.3f}")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.xaxis.set_major_formatter("{x:,.0f}")
        for axes in (above, below):
            axes.grid(visible=True)
        above.legend()
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png", dpi=130)
    partial.replace(path)
