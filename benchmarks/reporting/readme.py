"""The README's figures: a compact table of all devices, put between two markers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reporting import ratios, results, units
from benchmarks.reporting.content import commits, span, versions
from benchmarks.reporting.markdown import escape, grid
from benchmarks.reporting.results import ResultsError
from benchmarks.reporting.rows import BASELINE, MODEL_SUITES, MODES, SUITES, Row, Run
from benchmarks.reporting.tables import Line, date, suites

START, END = "<!-- figures:start -->", "<!-- figures:end -->"


def readme_figures(results_folder: str | Path) -> str:
    """What stands between the markers of a README: generated, so that a test can hold the README against it.

    Raises:
        ResultsError: no device folder is usable.
    """
    lines: list[Line] = []
    notes = []
    for folder in device_folders(results_folder):
        try:
            run = results.load_folder(folder)
        except ResultsError:  # the report names it
            continue
        lines += [(escape(run.machine.device), *map(escape, line)) for line in _models(run) + _operators(run)]
        notes.append(_note(run, folder))
    if not notes:
        raise ResultsError(f"{results_folder}: no device folder with results; accepted: FOLDER/<device>/*.json")
    head = grid(("device", "measured", "speed", "times as fast as"), lines)
    return f"{head}\n\nFrom the worst case to the best; {units.LOSS} is slower.\n\n" + "\n".join(notes) + "\n"


def device_folders(results_folder: str | Path) -> list[Path]:
    """The folders of devices, each with its results."""
    root = Path(results_folder)
    if not root.is_dir():
        raise ResultsError(f"{root}: no such folder; accepted: a folder with one folder of *.json for each device")
    return sorted(folder for folder in root.iterdir() if any(folder.glob("*.json")))


def replace_figures(readme: Path, figures: str) -> str:
    """The text of `readme` with `figures` between its markers.

    Raises:
        ResultsError: there is no such file, or it lacks the markers.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise ResultsError(f"{readme}: cannot be read: {error.strerror}; accepted: a text file") from None
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ResultsError(f"{readme}: the markers are missing; accepted: a line {START} and after it a line {END}")
    return f"{before}{START}\n{figures}{END}{after}"


def _models(run: Run) -> list[Line]:
    ours = ratios.champion(run)
    lines: list[Line] = []
    for suite in MODEL_SUITES:
        peers = [*ratios.model_peers(run, suite), *([BASELINE] if ours != BASELINE else [])]
        for (_, case, _, _), providers in ratios.cases(row for row in run.rows if row.suite == suite).items():
            if ours not in providers:
                continue
            row = providers[ours]
            found = [
                f"{units.ratio(ratios.Ratio(row, providers[other]).value)} {other}"
                for other in peers
                if other in providers
            ]
            used = "" if row.mfu is None else f", MFU {units.share(row.mfu)}"
            used += "" if row.mbu is None else f", MBU {units.share(row.mbu)}"
            speed = f"{units.count(row.tokens_per_second)} tokens/s{used}"
            lines.append((f"{SUITES[suite]}, {case}", speed, ", ".join(found)))
    return lines


def _operators(run: Run) -> list[Line]:
    lines: list[Line] = []
    for suite in suites(run.rows):
        rows = [row for row in run.rows if row.suite == suite]
        for mode in dict.fromkeys(row.mode for row in rows):
            found = _standings([row for row in rows if row.mode == mode])
            if found:
                lines.append((f"{SUITES.get(suite, suite)}, {MODES.get(mode, mode)}", "", found))
    return lines


def _standings(rows: list[Row]) -> str:
    return ", ".join(
        f"{' to '.join(span([ratio.value for ratio in standing.ratios]))} {standing.against}"
        for standing in ratios.standings(rows, "triton")
    )


def _note(run: Run, folder: Path) -> str:
    machine = run.machine
    driver = f"driver {machine.driver}, " if machine.driver else ""
    peers = "".join(f", {name} {version}" for name, version in machine.peers.items() if version)
    where = "/".join((*folder.resolve().parts[-3:], "report.md"))  # from the repository's root, wherever that is
    return (
        f"- {escape(machine.device)}: {driver}{versions(machine)}{peers}; measured {date(run.newest)} UTC at commit "
        f"{commits(run)}; [all figures]({where})"
    )
