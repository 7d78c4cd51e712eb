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

from benchmarks.reporting.names import MAIN, provider_order

WIDTH = 9.0  # inches

# (light, dark, marker) by name; report.mplstyle has ink, muted and grid too. The light colours must differ: `svg`
# replaces each by a CSS variable of its name.
PALETTE = {
    "ink": ("#1f2328", "#e6e8eb", ""),
    "muted": ("#656d76", "#9aa2ab", ""),
    "grid": ("#e3e6ea", "#30363d", ""),
    "own": ("#1463c9", "#5b9dff", ""),
    "own-loss": ("#c4351c", "#ff7a61", ""),
    "peer": ("#a9b4c0", "#5d6875", ""),
    "peer-loss": ("#e3b7a8", "#84564b", ""),
    "main": ("#1261c7", "#5c9cff", "o"),
    "main-fused": ("#0a3a7a", "#9cc5ff", "p"),
    "main-unfused": ("#2b6b4f", "#63c79b", "h"),
    "main-compiled": ("#7048c6", "#b191ff", "D"),
    "eager": ("#69717a", "#a2abb5", "s"),
    "eager-compiled": ("#6b3f16", "#c98d5c", "P"),
    "series-0": ("#3a8c1e", "#7fce62", "^"),
    "series-1": ("#d4570a", "#ff9a4d", "v"),
    "series-2": ("#bf2a7a", "#ff7abf", "X"),
    "series-3": ("#0b8091", "#45c4d6", "<"),
    "series-4": ("#94720a", "#d9b43c", ">"),
}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def color(name: str) -> str:
    """Light colour of a name, for matplotlib."""
    return PALETTE[name][0]


def provider_styles(providers: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each provider: fixed for gptfast's backends, in turn for the others."""
    styles, others = {}, 0
    for provider in sorted(set(providers), key=provider_order):
        name = marked = re.sub(f"^({'|'.join(MAIN)})", "main", provider).replace(" ", "-")
        if not PALETTE.get(name, ("", "", ""))[2]:
            name, marked = f"series-{others % 5}", f"series-{(others + others // 5) % 5}"
            others += 1
        styles[provider] = {"color": color(name), "marker": PALETTE[marked][2]}
    return styles


def style() -> Any:
    """Context in which figures are drawn, independent of the user's matplotlibrc."""
    return matplotlib.style.context(["default", Path(__file__).with_name("report.mplstyle")])


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
    used = {first or second for first, second in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)}
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    for variable, (light, *_) in PALETTE.items():
        text = text.replace(light, f"var(--{variable}, {light})")
    _, box, drawing = re.split(r'<svg [^>]*viewBox="([^"]+)"[^>]*>', text)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-label="{escape(label)}">'
    return opening + drawing.strip()
