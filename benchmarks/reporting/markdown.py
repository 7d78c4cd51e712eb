"""Markdown tables, and passages between a document's markers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def grid(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Format a table of cells that are already Markdown."""
    rule = ["---" for _ in columns]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))


def escape(text: str) -> str:
    """Escape plain text as one line of Markdown."""
    text = re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def passage(document: str, name: str) -> str:
    """Text between the markers `<!-- name:start -->` and `<!-- name:end -->`.

    Raises:
        ValueError: a marker is missing.
    """
    return _split(document, name)[1]


def replace_passage(path: Path, name: str, text: str) -> str:
    """Text of the document at `path` with `text` between the markers of `passage`.

    Raises:
        ValueError: a marker is missing.
    """
    try:
        before, _, after = _split(path.read_text(encoding="utf-8"), name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return before + text + after


def _split(document: str, name: str) -> tuple[str, str, str]:
    start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
    before, found, rest = document.partition(start)
    text, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the markers are missing; accepted: a line {start.strip()} and after it a line {end}")
    return before + start, text, end + after


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
