"""Writes a report for every device that was measured: `python -m benchmarks.report [RESULTS_FOLDER]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tyro

from benchmarks.reporting import figures, markdown, plotting, results
from benchmarks.reporting.content import RATIO_NOTE, content
from benchmarks.reporting.readme import device_folders, readme_figures, replace_figures
from benchmarks.reporting.results import ResultsError
from benchmarks.reporting.rows import MODEL_SUITES, OWN, SUITES, Run
from benchmarks.reporting.units import LOSS

__all__ = ["main", "readme_figures", "render_html", "write_report"]


@dataclass
class Options:
    """Write report.md and report.html into every device's folder of results."""

    results_folder: tyro.conf.Positional[str] = "benchmarks/results"
    """Folder with one folder of *.json for each device."""
    readme: str | None = None
    """README whose figures between <!-- figures:start --> and <!-- figures:end --> are replaced."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the reports. What cannot be read is said on stderr; exit status 2 if nothing can, or on a bad README."""
    options = tyro.cli(Options, prog="python -m benchmarks.report", args=arguments)
    try:
        folders = device_folders(options.results_folder)
        text = None
        if options.readme is not None:  # first, for it may fail
            text = replace_figures(Path(options.readme), readme_figures(options.results_folder))
        if not sum(write_report(folder) for folder in folders):
            raise ResultsError(f"{options.results_folder}: no device has results; accepted: FOLDER/<device>/*.json")
        if options.readme is not None and text is not None:
            _write(Path(options.readme), text)
    except ResultsError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        sys.exit(2)


def write_report(folder: Path) -> bool:
    """Write the reports of one device's folder; say what could not be read, and return whether anything could."""
    try:
        run = results.load_folder(folder)
    except ResultsError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return False
    for problem in run.problems:
        print(f"benchmarks.report: {problem}", file=sys.stderr)
    _write(folder / "report.md", markdown.render(content(run, folder), run.machine.device))
    _write(folder / "report.html", render_html(run, folder))
    print(f"{folder / 'report.html'}: {len(run.rows)} rows of {run.machine.device}")
    return True


def render_html(run: Run, folder: Path) -> str:
    """The whole report as one page that needs nothing else."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = figures.figures(run)
    return environment.get_template("report.html.jinja").render(
        device=run.machine.device,
        content=content(run, folder),
        figures={name: [figure for figure in drawn if figure.suite == name] for name in SUITES | _other(run)},
        suites=SUITES | _other(run),
        model_suites=MODEL_SUITES,
        own=[name for name in OWN if name.startswith("triton")],
        palette=plotting.PALETTE,
        ratio_note=RATIO_NOTE,
        loss=LOSS,
    )


def _other(run: Run) -> dict[str, str]:
    return {row.suite: row.suite for row in run.rows if row.suite not in SUITES}


def _write(path: Path, text: str) -> None:
    """All of it or nothing: a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    main()
