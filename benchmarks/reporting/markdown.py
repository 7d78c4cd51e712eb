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
    start, end = f"<!-- {name}:start -->\n", f"<!-- {name}:end -->"
    found = re.search(f"{start}(.*?){end}", document, re.DOTALL)
    if found is None:
        raise ValueError(f"the markers are missing; accepted: a line {start.strip()} and after it a line {end}")
    return found[1]


def replace_passage(path: Path, name: str, text: str) -> str:
    """Text of the document at `path` with `text` as its `passage`.

    Raises:
        ValueError: a marker is missing.
    """
    document = path.read_text(encoding="utf-8")
    try:
        old = passage(document, name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    start = f"<!-- {name}:start -->\n"
    return document.replace(start + old, start + text, 1)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
