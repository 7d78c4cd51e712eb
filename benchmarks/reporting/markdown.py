"""A report in Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from benchmarks.reporting.content import RATIO_NOTE, Content
from benchmarks.reporting.rows import SUITES
from benchmarks.reporting.tables import Line, Table


def render(content: Content, device: str) -> str:
    """The whole report."""
    parts = [f"# gptfast on {escape(device)}"]
    parts.append("\n".join(f"- **{name}:** {escape(text)}" for name, text in content.headline))
    parts += [f"> {escape(line)}" for line in content.warnings]
    parts += ["## Summary", RATIO_NOTE]
    if content.leads:
        lines = [(lead.label, " to ".join(lead.values), lead.detail) for lead in content.leads]
        parts.append(grid(("", "times as fast", ""), [tuple(map(escape, line)) for line in lines]))
    parts += [_table(table) for table in content.summary]
    if content.models:
        parts += [
            "## Models",
            *([content.mfu_note] if content.mfu_note else []),
            *(_table(table) for table in content.models),
        ]
    for suite, tables in content.kernels.items():
        parts += [f"## {escape(SUITES.get(suite, suite))}", *(_table(table) for table in tables)]
    parts.append("## What was not measured, and why")
    if content.not_measured:
        lines = [(str(count), escape(what), escape(reason)) for count, what, reason in content.not_measured]
        parts.append(grid(("measurements", "what", "why"), lines))
    else:
        parts.append("Nothing: all that was asked for was measured.")
    parts += ["## How the figures were taken", "\n".join(f"- {line}" for line in content.method)]
    parts += [_table(content.sources), "Figures are in `report.html`, which lies beside this file."]
    return "\n\n".join(parts) + "\n"


def grid(columns: Line, lines: Sequence[Line]) -> str:
    """A table of cells that are already Markdown."""
    rule = tuple("---" for _ in columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))


def escape(text: str) -> str:
    """Plain text as one line of Markdown."""
    text = re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _table(table: Table) -> str:
    """The headings of groups stand in a column of their own, on the first line of each."""
    lines: list[Line] = []
    for heading, group in table.groups.items():
        for number, line in enumerate(group):
            first = (heading if number == 0 else "",) if table.grouping else ()
            lines.append(tuple(map(escape, (*first, *line))))
    columns = (table.grouping, *table.columns) if table.grouping else table.columns
    return f"### {escape(table.title)}\n\n{grid(tuple(map(escape, columns)), lines)}"
