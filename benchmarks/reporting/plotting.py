"""How figures look, and how matplotlib's SVG becomes part of a page: its colours and font are those of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from benchmarks.reporting.rows import provider_order

WIDTH = 9.0  # inches

# (light, dark) by name. The light ones stand in the SVG as fallbacks and must differ, for they are how a colour is
# found again in what matplotlib writes.
PALETTE = {
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#656d76", "#9aa2ab"),
    "grid": ("#e3e6ea", "#30363d"),
    "panel": ("#fefefe", "#14181d"),
    "own": ("#1463c9", "#5b9dff"),
    "own-loss": ("#c4351c", "#ff7a61"),
    "peer": ("#a9b4c0", "#5d6875"),
    "peer-loss": ("#e3b7a8", "#84564b"),
    "triton": ("#1261c7", "#5c9cff"),
    "triton-fused": ("#0a3a7a", "#9cc5ff"),
    "triton-unfused": ("#2b6b4f", "#63c79b"),
    "triton-compiled": ("#7048c6", "#b191ff"),
    "eager": ("#69717a", "#a2abb5"),
    "eager-compiled": ("#6b3f16", "#c98d5c"),
    "series-1": ("#3a8c1e", "#7fce62"),
    "series-2": ("#d4570a", "#ff9a4d"),
    "series-3": ("#bf2a7a", "#ff7abf"),
    "series-4": ("#0b8091", "#45c4d6"),
    "series-5": ("#94720a", "#d9b43c"),
}
_STYLES = {  # colour and marker
    "triton": ("triton", "o"),
    "triton fused": ("triton-fused", "p"),
    "triton unfused": ("triton-unfused", "h"),
    "triton compiled": ("triton-compiled", "D"),
    "eager": ("eager", "s"),
    "eager compiled": ("eager-compiled", "P"),
}
_FURTHER = [("series-1", "^"), ("series-2", "v"), ("series-3", "X"), ("series-4", "<"), ("series-5", ">")]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and set in the page's font
    "svg.hashsalt": "gptfast",
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "font.family": ["DejaVu Sans"],  # only to measure: comes with matplotlib and is wider than what pages use
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}


def color(name: str) -> str:
    """The colour of this name, for matplotlib."""
    return PALETTE[name][0]


def provider_styles(providers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each provider: gptfast's and eager always the same, the others in turn."""
    styles, further = {}, 0
    for provider in sorted(set(providers), key=provider_order):
        if provider in _STYLES:
            name, marker = _STYLES[provider]
        else:
            turn, number = divmod(further, len(_FURTHER))
            name, marker = _FURTHER[number][0], _FURTHER[(number + turn) % len(_FURTHER)][1]
            further += 1
        styles[provider] = color(name), marker
    return styles


def style() -> Any:
    """A context in which figures are drawn."""
    ink, muted = color("ink"), color("muted")
    colors = {"text.color": ink, "axes.titlecolor": ink, "grid.color": color("grid"), "axes.facecolor": "none"}
    colors |= dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), muted)
    # from the defaults on: what a user's matplotlibrc says must not show
    return matplotlib.style.context(["default", _SETTINGS | colors])


def canvas(height: float) -> Canvas:
    """An empty figure of the usual width."""
    return Canvas(figsize=(WIDTH, height), facecolor="none")


def panels(count: int, columns: int, height: float = 3.0) -> tuple[Canvas, list[Any]]:
    """A figure of `count` axes in rows, and the axes."""
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    figure = Canvas(figsize=(WIDTH, height * rows + 0.5), facecolor="none", layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def legend(figure: Canvas, handles: list[Line2D]) -> None:
    """A legend over all axes, in as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(WIDTH / (0.6 + 0.075 * longest))))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.4)


def svg(figure: Canvas, prefix: str, label: str) -> str:
    """The figure as SVG to stand in HTML.

    Args:
        figure: what was drawn.
        prefix: makes its ids differ from those of other figures in the page.
        label: says what it shows, for those who cannot see it.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # its metadata hold the date, which differs every time
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name}, {light})")
    text = text.replace("'DejaVu Sans'", _FONT)
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1]}" role="img" aria-label="{escape(label)}">'
    return opening + text[text.index(">") + 1 :].strip()
