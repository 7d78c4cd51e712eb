"""Style of the figures, and SVG whose colours and font are those of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.reporting.names import MAIN, provider_order

WIDTH = 9.0  # inches

# (light, dark) by name; report.mplstyle has ink, muted and grid. The light ones must differ: `svg` replaces each by a
# CSS variable of its name.
PALETTE = {
    "ink": ("#1f2328", "#e6e8eb"),
    "muted": ("#656d76", "#9aa2ab"),
    "grid": ("#e3e6ea", "#30363d"),
    "own": ("#1463c9", "#5b9dff"),
    "own-loss": ("#c4351c", "#ff7a61"),
    "peer": ("#a9b4c0", "#5d6875"),
    "peer-loss": ("#e3b7a8", "#84564b"),
    "main": ("#1261c7", "#5c9cff"),
    "main-fused": ("#0a3a7a", "#9cc5ff"),
    "main-unfused": ("#2b6b4f", "#63c79b"),
    "main-compiled": ("#7048c6", "#b191ff"),
    "eager": ("#69717a", "#a2abb5"),
    "eager-compiled": ("#6b3f16", "#c98d5c"),
    "series-1": ("#3a8c1e", "#7fce62"),
    "series-2": ("#d4570a", "#ff9a4d"),
    "series-3": ("#bf2a7a", "#ff7abf"),
    "series-4": ("#0b8091", "#45c4d6"),
    "series-5": ("#94720a", "#d9b43c"),
}
_MARKERS = {
    "main": "o",
    "main-fused": "p",
    "main-unfused": "h",
    "main-compiled": "D",
    "eager": "s",
    "eager-compiled": "P",
}
_OTHERS = [("series-1", "^"), ("series-2", "v"), ("series-3", "X"), ("series-4", "<"), ("series-5", ">")]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def color(name: str) -> str:
    """Light colour of a name, for matplotlib."""
    return PALETTE[name][0]


def provider_styles(providers: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each provider: fixed for gptfast's backends, in turn for the others."""
    styles = {}
    others = [(name, _OTHERS[(at + turn) % 5][1]) for turn in range(5) for at, (name, _) in enumerate(_OTHERS)]
    for provider in sorted(set(providers), key=provider_order):
        name = re.sub(f"^({'|'.join(MAIN)})", "main", provider).replace(" ", "-")
        name, marker = (name, _MARKERS[name]) if name in _MARKERS else others.pop(0)
        styles[provider] = color(name), marker
    return styles


def style() -> Any:
    """Context in which figures are drawn, independent of the user's matplotlibrc."""
    return matplotlib.style.context(["default", Path(__file__).with_name("report.mplstyle")])


def panels(groups: Any) -> tuple[Figure, list[tuple[Any, Any]]]:
    """Create a figure of two panels a row with the titles of `groups`, a pandas grouping; axes and rows of each."""
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(WIDTH, 3.0 * lines + 0.5), layout="constrained")
    drawn = []
    for number, (title, rows) in enumerate(groups, 1):
        axes = figure.add_subplot(lines, columns, number, title=title)
        drawn.append((axes, rows))
    return figure, drawn


def legend(figure: Figure, handles: list[Line2D]) -> None:
    """Draw a legend above all axes, in as many columns as fit."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), int(WIDTH / (0.6 + 0.075 * longest))))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.4)


def svg(figure: Figure, name: str, label: str) -> str:
    """Convert a figure to SVG for a page.

    Args:
        figure: the figure.
        name: unique in the page; it keeps ids of different figures apart.
        label: text for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue().replace("xlink:href", "href").replace("'DejaVu Sans'", _FONT)
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    used = {first or second for first, second in used}
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    for variable, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{variable}, {light})")
    _, box, drawing = re.split(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', text)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-label="{escape(label)}">'
    return opening + drawing.strip()
