"""Write the reports of all measured devices: `python -m benchmarks.report [RESULTS_FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jinja2
import tyro

from benchmarks.measuring.processes import run_command
from benchmarks.reporting import results, tables
from benchmarks.reporting.figures import figures
from benchmarks.reporting.markdown import escape, grid, replace_passage, write_text
from benchmarks.reporting.names import MAIN
from benchmarks.reporting.plotting import PALETTE
from benchmarks.reporting.results import Results, ResultsError, device_folders
from benchmarks.reporting.units import SLOWER

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "reporting"),
    autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["md"] = lambda value: escape(str(value))


def report(results_folder: tyro.conf.Positional[str] = "benchmarks/results", readme: str | None = None) -> None:
    """Write report.md and report.html into every device's folder of results.

    Args:
        results_folder: folder with one folder of *.json for each device.
        readme: README whose figures between <!-- figures:start --> and <!-- figures:end --> are replaced.
    """
    folders = device_folders(results_folder)
    documents = {Path(readme): readme_figures(results_folder)} if readme else {}
    # a README without markers is an error before anything is written
    documents = {path: replace_passage(path, "figures", text) for path, text in documents.items()}
    written = [write_report(folder) for folder in folders]
    if not any(written):
        raise ResultsError(f"{results_folder}: no device has results; accepted: FOLDER/<device>/*.json")
    for path, text in documents.items():
        write_text(path, text)


def write_report(folder: Path) -> bool:
    """Write the reports of one device's folder and print what was rejected; False if nothing was usable."""
    try:
        run = results.load(folder)
    except ResultsError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return False
    for problem in run.problems:
        print(f"benchmarks.report: {problem}", file=sys.stderr)
    write_text(folder / "report.md", render_markdown(run, folder))
    write_text(folder / "report.html", render_html(run, folder))
    print(f"{folder / 'report.html'}: {len(run.rows)} rows of {run.machine.device}")
    return True


def render_markdown(run: Results, folder: Path) -> str:
    """Render the report as Markdown."""
    return TEMPLATES.get_template("report.md.jinja").render(tables.content(run, folder))


def render_html(run: Results, folder: Path) -> str:
    """Render the report as a page that loads nothing else."""
    drawn = {suite: figures(run, suite) for suite in run.rows["suite"].unique()}
    look = {"palette": PALETTE, "slower": SLOWER, "highlighted": MAIN}
    return TEMPLATES.get_template("report.html.jinja").render(tables.content(run, folder), figures=drawn, **look)


def readme_figures(results_folder: str | Path) -> str:
    """Format the README's table of all devices.

    Raises:
        ResultsError: no device's folder is usable.
    """
    lines, notes = [], []
    for folder in device_folders(results_folder):
        try:
            run = results.load(folder)
        except ResultsError:  # `write_report` prints it
            continue
        device = escape(run.machine.device)
        lines += [(device, *map(escape, line)) for line in tables.readme_lines(run)]
        driver = f"driver {run.machine.driver}, " if run.machine.driver else ""
        path = "/".join((*folder.resolve().parts[-3:], "report.md"))  # relative to the repository's root
        notes.append(f"- {device}: {driver}{tables.origin(run)}; [all figures]({path})")
    if not notes:
        raise ResultsError(f"{results_folder}: no device folder with results; accepted: FOLDER/<device>/*.json")
    table = grid(("device", "measured", "speed", "times as fast as"), lines)
    note = f"Ratios run from the worst case to the best; {SLOWER} marks a slower case."
    return "\n\n".join([table, note, "\n".join(notes)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the reports; exit status 2 if no file is usable or the README has no markers."""
    run_command(report, "benchmarks.report", arguments)


if __name__ == "__main__":
    main()
