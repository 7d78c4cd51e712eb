"""Compare two results of one device: `python -m benchmarks.compare OLD NEW`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from pandas import DataFrame

from benchmarks.measuring.processes import run_command
from benchmarks.reporting import results, units
from benchmarks.reporting.names import KEY
from benchmarks.reporting.results import Results, ResultsError, device_folders


def compare(old: tyro.conf.Positional[str], new: tyro.conf.Positional[str], threshold: float = 0.05) -> None:
    """Compare the medians of two results of one device, and fail on regressions.

    A regression is slower by more than the threshold, and by more than noise: its new p20 lies above its old p80.
    Exit status: 0 without regressions, 1 with some, 2 if something cannot be read or compared.

    Args:
        old: results file, a folder of them, or a folder with that of one device.
        new: like the old ones.
        threshold: tolerated slowdown of the median, as a share of the old one.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ResultsError(f"--threshold is {threshold}; accepted: a finite number of at least 0")
    before, after = _load(old), _load(new)
    if before.machine.device != after.machine.device:
        raise ResultsError(
            f"different devices: {old} is of {before.machine.device}, {new} of {after.machine.device}; accepted: two "
            "results of one device"
        )
    both = before.rows.merge(after.rows, on=KEY, suffixes=("_old", "_new"))
    if both.empty:
        raise ResultsError(f"no row is in both {old} and {new}; accepted: results of the same cases")
    table = _changes(both, threshold)
    words = {name: table[name].str.ljust(table[name].str.len().max()) for name in (*KEY, "")}
    print(table.assign(**words).to_string(index=False, justify="left"))
    for path, run in ((old, before), (new, after)):
        only = run.rows[KEY].merge(both[KEY], how="left_anti", on=KEY)
        if len(only):
            print("\n  ".join([f"\nonly in {path}:", *map(", ".join, only.itertuples(index=False))]))
    regressions = int((table[""] == "REGRESSION").sum())
    limit = f"slower by more than {100 * threshold:g} % and by more than noise"
    print(f"\n{before.machine.device}: {len(both)} rows compared, {regressions} {limit}")
    sys.exit(1 if regressions else 0)


def _changes(rows: DataFrame, threshold: float) -> DataFrame:
    """Old and new median, their ratio (above 1 is slower) and the verdict on it."""
    ratio = rows["median_new"] / rows["median_old"]
    verdict = ratio.map(lambda ratio: "slower, within noise" if ratio > 1 + threshold else "")
    verdict = verdict.mask((ratio > 1 + threshold) & (rows["p20_new"] > rows["p80_old"]), "REGRESSION")
    is_faster = ratio < 1 / (1 + threshold)
    verdict = verdict.mask(is_faster, "faster, within noise").mask(
        is_faster & (rows["p80_new"] < rows["p20_old"]), "faster"
    )
    times = {side: rows[f"median_{side}"].map(units.seconds) for side in ("old", "new")}
    return rows[KEY].assign(**times, **{"new/old": ratio.map("{:.2f}".format), "": verdict})


def _load(path: str) -> Results:
    """Load results, or those of the only device in a folder. A rejected file is an error: it may hold a regression."""
    if Path(path).is_dir() and not any(Path(path).glob("*.json")):
        folders = device_folders(path)
        if len(folders) > 1:
            names = ", ".join(map(str, folders))
            raise ResultsError(f"{path} has results of several devices; accepted: one of {names}")
        path = str(folders[0]) if folders else path
    run = results.load(path)
    if run.problems:
        raise ResultsError(run.problems[0])
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison and exit with its status."""
    run_command(compare, "benchmarks.compare", arguments)


if __name__ == "__main__":
    main()
