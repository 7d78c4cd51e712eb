"""Compares two results of one device: `python -m benchmarks.compare OLD NEW`.

A row is a regression if its median became slower by more than the threshold, and the slowdown is also more than noise:
the new median's distance from the old one exceeds the old p80's from the old median plus the new median's from the new
p20. That is, the new p20 lies above the old p80.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.reporting import results, units
from benchmarks.reporting.readme import device_folders
from benchmarks.reporting.results import ResultsError
from benchmarks.reporting.rows import Key, Row, Run


@dataclass
class Options:
    """Compare the medians of two results of one device, and fail on regressions.

    A regression is slower by more than the threshold, and by more than noise: its new p20 lies above its old p80.
    Exit status: 0 without regressions, 1 with some, 2 if something cannot be read or compared.
    """

    old: tyro.conf.Positional[str]
    """Results file, a folder of them, or a folder with that of one device."""
    new: tyro.conf.Positional[str]
    """As the old ones."""
    threshold: float = 0.05
    """Slowdown of the median that is tolerated, as a share of the old one."""


@dataclass(frozen=True)
class Change:
    """One measurement, taken twice."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """New over old median: above 1 is slower."""
        return self.new.seconds.median / self.old.seconds.median

    def verdict(self, threshold: float) -> str:
        """What the change is, by the rule that the module states."""
        if self.ratio > 1 + threshold:
            return "REGRESSION" if self.new.seconds.p20 > self.old.seconds.p80 else "slower, within noise"
        if self.ratio < 1 / (1 + threshold):
            return "faster" if self.new.seconds.p80 < self.old.seconds.p20 else "faster, within noise"
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison and exit with its status."""
    options = tyro.cli(Options, prog="python -m benchmarks.compare", args=arguments)
    try:
        sys.exit(1 if compare(options) else 0)
    except ResultsError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        sys.exit(2)


def compare(options: Options) -> int:
    """Print the comparison; returns the number of regressions. Raises ResultsError if there is nothing to compare."""
    if not (math.isfinite(options.threshold) and options.threshold >= 0):
        raise ResultsError(f"--threshold is {options.threshold}; accepted: a finite number of at least 0")
    old, new = _load(options.old), _load(options.new)
    if old.machine.device != new.machine.device:
        raise ResultsError(
            f"different devices: {options.old} is of {old.machine.device}, {options.new} of {new.machine.device}; "
            "accepted: two results of one device"
        )
    before, after = ({row.key: row for row in run.rows} for run in (old, new))
    changes = [Change(row, after[key]) for key, row in before.items() if key in after]
    if not changes:
        raise ResultsError(f"no row is in both {options.old} and {options.new}; accepted: results of the same cases")
    _print_table(changes, options.threshold)
    _print_only(options.old, before.keys() - after.keys())
    _print_only(options.new, after.keys() - before.keys())
    regressions = sum(change.verdict(options.threshold) == "REGRESSION" for change in changes)
    limit = f"slower by more than {100 * options.threshold:g} % and by more than noise"
    print(f"\n{old.machine.device}: {len(changes)} rows compared, {regressions} {limit}")
    return regressions


def _load(path: str) -> Run:
    """Unlike a report, a comparison must not go on without a file: what regressed might be in it.

    A folder whose results are those of one device, in a folder of its own, stands for that one.
    """
    if Path(path).is_dir() and not any(Path(path).glob("*.json")):
        folders = device_folders(path)
        if len(folders) > 1:
            names = ", ".join(str(folder) for folder in folders)
            raise ResultsError(f"{path} has results of several devices; accepted: one of {names}")
        path = str(folders[0]) if folders else path
    run = results.load(path)
    if run.problems:
        raise ResultsError(run.problems[0])
    return run


def _print_table(changes: list[Change], threshold: float) -> None:
    lines = [("suite", "case", "mode", "provider", "old", "new", "new/old", "")]
    for change in changes:
        times = (units.seconds(change.old.seconds.median), units.seconds(change.new.seconds.median))
        lines.append((*change.old.key, *times, f"{change.ratio:.2f}", change.verdict(threshold)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            text.rjust(width) if 4 <= column <= 6 else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_only(path: str, keys: Iterable[Key]) -> None:
    if keys := sorted(keys):
        print(f"\nonly in {path}:")
        for key in keys:
            print("  " + ", ".join(key))


if __name__ == "__main__":
    main()
