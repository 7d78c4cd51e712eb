"""Tables that README.md and docs/generation.md show of the committed results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.reporting import ratios, results, units
from benchmarks.reporting.content import commits, span, versions
from benchmarks.reporting.markdown import escape, grid
from benchmarks.reporting.names import MODEL_SUITES, title
from benchmarks.reporting.results import Results, ResultsError


def device_folders(results_folder: str | Path) -> list[Path]:
    """List the folders of devices that have results."""
    root = Path(results_folder)
    if not root.is_dir():
        raise ResultsError(f"{root}: no such folder; accepted: a folder with one folder of *.json for each device")
    return sorted(folder for folder in root.iterdir() if any(folder.glob("*.json")))


def readme_figures(results_folder: str | Path) -> str:
    """Format the README's table of all devices.

    Raises:
        ResultsError: no device's folder is usable.
    """
    lines, notes = [], []
    for folder in device_folders(results_folder):
        try:
            run = results.load(folder)
        except ResultsError:  # `benchmarks.report` prints it
            continue
        lines += [tuple(map(escape, (run.machine.device, *line))) for line in _lines(run)]
        driver = f"driver {run.machine.driver}, " if run.machine.driver else ""
        report = "/".join((*folder.resolve().parts[-3:], "report.md"))  # relative to the repository's root
        notes.append(f"- {escape(run.machine.device)}: {driver}{_origin(run)}; [all figures]({report})")
    if not notes:
        raise ResultsError(f"{results_folder}: no device folder with results; accepted: FOLDER/<device>/*.json")
    table = grid(("device", "measured", "speed", "times as fast as"), lines)
    note = f"Ratios run from the worst case to the best; {units.SLOWER} marks a slower case."
    return "\n\n".join([table, note, "\n".join(notes)]) + "\n"


def _lines(run: Results) -> Iterator[tuple[str, str, str]]:
    """Measurement, speed and ratios of the main backend: by case for models, over all cases for operators."""
    main = ratios.main_provider(run.rows)
    for (suite, mode), rows in run.rows.groupby(["suite", "mode"], sort=False):
        ours = ratios.of_provider(rows, main)
        if suite not in MODEL_SUITES:
            found = {other: span(against["ratio"]) for other, against in ratios.summaries(rows, main).items()}
            if found:
                yield title(suite, mode), "", ", ".join(f"{' to '.join(ends)} {other}" for other, ends in found.items())
            continue
        faster = ratios.against_each(ours, rows)
        for index, row in ours.iterrows():
            speed = f"{units.count(row['tokens_per_second'])} tokens/s"
            speed += "".join(
                f", {name.upper()} {units.share(row[name])}" for name in row[["mfu", "mbu"]].dropna().index
            )
            text = ", ".join(f"{units.ratio(ratio)} {other}" for other, ratio in faster.loc[index].dropna().items())
            yield f"{title(suite, mode)}, {row['case']}", speed, text


def _origin(run: Results) -> str:
    peers = "".join(f", {name} {version}" for name, version in (run.machine.peers or {}).items() if version)
    when = f"{run.used_files[0].when:%Y-%m-%d %H:%M} UTC"
    return f"{versions(run.machine)}{peers}; measured {when} at commit {commits(run)}"


def generation_table(folder: str | Path) -> str:
    """Format the table of docs/generation.md: the speed of every provider, and its ratios to the others.

    Raises:
        ResultsError: nothing usable in the folder.
    """
    run = results.load(folder)
    rows = run.rows[run.rows["suite"] == "generation"]
    faster = ratios.against_each(rows, rows)
    lines = [
        (
            *(str(row["dims"][name]) for name in ("model", "B", "T", "new")),
            "int8" if row["provider"].endswith("int8") else row["dtype"],
            *(row["provider"], units.count(row["tokens_per_second"]), units.seconds(row["seconds_to_first_token"])),
            *map(units.ratio, faster.loc[index]),
        )
        for index, row in rows.iterrows()
    ]
    sizes = ("model", "batch", "prompt", "new", "dtype")
    columns = (*sizes, "provider", "tokens/s", "first token", *(f"times {other}" for other in faster.columns))
    return f"{grid(columns, lines)}\n\n{escape(run.machine.device)}: {_origin(run)}.\n"
