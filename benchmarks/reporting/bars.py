"""Horizontal bars in groups, each bar with its name and its number beside it, so that no legend is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure as Canvas

from benchmarks.reporting.plotting import WIDTH, canvas, color

LIMIT = 40
_ROW = 0.21  # inches
_NUMBER, _LOSS_NUMBER = 0.8, 1.0  # inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 1.95, 0.15, 0.1, 0.5


@dataclass(frozen=True)
class Bar:
    """A bar from the chart's origin to `end`, with the number as `text`, and whiskers from `low` to `high`."""

    name: str
    end: float
    text: str
    color: str
    low: float | None = None
    high: float | None = None
    strong: bool = False


@dataclass(frozen=True)
class Group:
    """Bars under a common heading."""

    title: str
    bars: tuple[Bar, ...]


def split(groups: Sequence[Group], limit: int = LIMIT) -> list[list[Group]]:
    """Divide groups among charts of about the same size, so that none has more than `limit` bars."""
    total = sum(len(group.bars) for group in groups)
    fair = math.ceil(total / max(1, math.ceil(total / limit)))
    parts: list[list[Group]] = []
    room = 0
    for group in groups:
        if room < len(group.bars) / 2 or sum(len(other.bars) for other in parts[-1]) + len(group.bars) > limit:
            parts.append([])
            room = fair
        parts[-1].append(group)
        room -= len(group.bars)
    return parts


def draw(groups: Sequence[Group], origin: float, log: bool, label: str) -> Canvas:
    """Draw the groups from top to bottom.

    Args:
        groups: what to draw; the height follows from it.
        origin: where bars begin.
        log: whether the axis is logarithmic.
        label: of the axis.
    """
    lines = sum(len(group.bars) + 1.4 for group in groups)
    height = lines * _ROW + _TOP + _BOTTOM
    figure = canvas(height)
    left = max(_LEFT, 0.2 + 0.072 * max((len(bar.name) for group in groups for bar in group.bars), default=0))
    width = 1 - (left + _RIGHT) / WIDTH
    axes = figure.add_axes((left / WIDTH, _BOTTOM / height, width, 1 - (_TOP + _BOTTOM) / height))
    if log:
        axes.set_xscale("log")
    ends = [
        value for group in groups for bar in group.bars for value in (bar.low, bar.end, bar.high) if value is not None
    ]
    _set_limits(axes, min([origin, *ends]), max([origin, *ends]), log)
    axes.set_ylim(lines, 0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.axvline(origin, color=color("ink"), linewidth=1.1, zorder=3)
    axes.set_xlabel(label)
    place = 0.0
    for group in groups:
        axes.annotate(
            group.title,
            xy=(0, place + 0.85),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-left * 72 + 2, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )
        for number, bar in enumerate(group.bars):
            _draw_bar(axes, bar, origin, place + 1.8 + number)
        place += len(group.bars) + 1.4
    return figure


def _set_limits(axes, low: float, high: float, log: bool) -> None:
    """Leave room for the numbers at the ends of the bars."""
    width = axes.get_position().width * WIDTH
    if not log:
        axes.set_xlim(0, high * width / (width - _NUMBER) or 1)
        return
    left, right = (_LOSS_NUMBER if low < 1 else 0.1), _NUMBER
    inch = math.log(max(high / low, 1.2)) / (width - left - right)
    low, high = low / math.exp(left * inch), high * math.exp(right * inch)
    axes.set_xlim(low, high)
    kept: list[float] = []
    wanted = (1, 2, 0.5, 5, 0.2, 10, 0.1, 20, 50, 0.05, 100, 1.5, 0.7, 3, 0.3, 7, 1.2, 0.8, 0.9, 1.1, 1.05, 0.95)
    for tick in wanted:
        if low <= tick <= high and all(abs(math.log(tick / other)) > 0.055 * math.log(high / low) for other in kept):
            kept.append(tick)
    axes.set_xticks(sorted(kept), [f"{tick:g}\N{MULTIPLICATION SIGN}" for tick in sorted(kept)])
    axes.minorticks_off()


def _draw_bar(axes, bar: Bar, origin: float, y: float) -> None:
    axes.barh(y, bar.end - origin, left=origin, height=0.74, color=bar.color, zorder=2)
    outer = [value for value in (bar.low, bar.end, bar.high) if value is not None]
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [y, y], color=color("ink"), linewidth=0.9, zorder=4)
        for end in (bar.low, bar.high):
            axes.plot([end, end], [y - 0.17, y + 0.17], color=color("ink"), linewidth=0.9, zorder=4)
    leftwards = bar.end < origin
    axes.annotate(
        bar.text,
        xy=(min(outer) if leftwards else max(outer), y),
        xytext=(-4 if leftwards else 4, 0),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        va="center",
        fontsize=8.5,
        fontweight="bold" if bar.strong else "normal",
    )
    axes.annotate(
        bar.name,
        xy=(0, y),
        xycoords=axes.get_yaxis_transform(),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8.5,
        fontweight="bold" if bar.strong else "normal",
        annotation_clip=False,
    )
