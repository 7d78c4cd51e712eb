"""Reads results: files that pytest-benchmark wrote with gptfast's additions, alone or merged by device."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.reporting.fields import FieldError, Fields
from benchmarks.reporting.rows import Machine, NotMeasured, Peak, Row, Run, Source, Spread, row_order

FORMAT = 1
_OPTIONAL_NUMBERS = [field.name for field in dataclasses.fields(Row) if field.type == "float | None"]


class ResultsError(ValueError):
    """A file or folder that holds no usable results. The message is one line: what, what is wrong, what is accepted."""


def load(path: str | Path) -> Run:
    """Read a file or a folder of files; see `load_file` and `load_folder`."""
    return load_folder(path) if Path(path).is_dir() else load_file(path)


def load_folder(folder: str | Path) -> Run:
    """Read and merge the files of a device's folder. Unusable ones end in `problems`, the rest goes on.

    A folder holds one device: the one it is named after, else that of the newest file.

    Raises:
        ResultsError: no file of the folder is usable.
    """
    folder = Path(folder)
    runs, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            runs.append(load_file(path))
        except ResultsError as error:
            problems.append(str(error))
    if not runs:
        found = "; ".join(problems) or "it has no *.json"
        raise ResultsError(f"{folder}: no results in this folder: {found}")
    named = [run for run in runs if run.machine.slug == folder.name]
    device = max(named or runs, key=lambda run: run.newest.when).machine.device
    for run in runs:
        if run.machine.device != device:
            problems.append(f"{run.newest.path}: measured on {run.machine.device}; accepted in its folder: {device}")
    merged = merge(run for run in runs if run.machine.device == device)
    return dataclasses.replace(merged, problems=tuple(problems))


def merge(runs: Iterable[Run]) -> Run:
    """One run of several of the same device: of a measurement taken repeatedly, the newest counts.

    Raises:
        ResultsError: the runs are of different devices, or there is none.
    """
    ordered = sorted(runs, key=lambda run: run.newest.when)
    devices = sorted({run.machine.device for run in ordered})
    if len(devices) != 1:
        raise ResultsError(f"cannot merge results of {' and '.join(devices) or 'nothing'}; accepted: one device")
    # files of other kinds lie beside those with rows: the machine is what the figures were measured on
    measured = [run for run in ordered if run.rows or run.not_measured] or ordered
    rows = {row.key: row for run in ordered for row in run.rows}
    missing = {item.key: item for run in ordered for item in run.not_measured if item.key not in rows}
    return Run(
        machine=measured[-1].machine,
        sources=tuple(source for run in ordered for source in run.sources),
        rows=tuple(sorted(rows.values(), key=row_order)),
        not_measured=tuple(missing.values()),
        problems=tuple(problem for run in ordered for problem in run.problems),
    )


def load_file(path: str | Path) -> Run:
    """Read one file.

    Raises:
        ResultsError: it cannot be read, is not JSON, is not gptfast's, or lacks what it must have.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ResultsError(f"{path}: cannot be read: {reason}; accepted: a results file or a folder of them") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{path}: not JSON, or cut short: {error}; accepted: a whole results file") from None
    version = data.get("gptfast_results") if isinstance(data, dict) else None
    if version is None:
        raise ResultsError(f'{path}: not a results file of gptfast; accepted: JSON with "gptfast_results": {FORMAT}')
    if version != FORMAT or isinstance(version, bool):
        raise ResultsError(f"{path}: gptfast_results is {version!r}; accepted: {FORMAT}")
    try:
        return _run(Fields(data, ""), str(path))
    except FieldError as error:
        raise ResultsError(f"{path}: {error}") from None


def _run(data: Fields, path: str) -> Run:
    machine = _machine(data.object("machine_info").object("gptfast"))
    commit = data.object("commit_info")
    dirty = commit.get("dirty", bool, "true or false")
    source = Source(path, commit.text("id"), dirty, _when(data), machine)
    rows: dict[tuple, Row] = {}
    for benchmark in data.objects("benchmarks"):
        row = _row(benchmark.object("extra_info"), source)
        if row.key in rows:
            raise FieldError(f"{benchmark.where} measures {', '.join(row.key)} again; accepted: once per file")
        rows[row.key] = row
    missing = [
        NotMeasured(*(item.text(name) for name in ("suite", "case", "mode", "provider", "reason")))
        for item in data.objects("not_measured")
    ]
    unmeasured = tuple(item for item in missing if item.key not in rows)
    return Run(machine, (source,), tuple(sorted(rows.values(), key=row_order)), unmeasured)


def _when(data: Fields) -> datetime:
    text = data.text("datetime")
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise FieldError(f"datetime is {text!r}; accepted: a date and time by ISO 8601") from None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _machine(data: Fields) -> Machine:
    limits, peak = data.object("limits"), data.object("peak")
    peers = data.optional_object("peers")
    texts: dict[str, Any] = {name: data.text(name) for name in ("device", "slug", "kind", "torch", "gptfast", "python")}
    texts |= {name: data.optional_text(name) for name in ("driver", "cuda", "triton")}
    return Machine(
        **texts,
        threads=int(data.number("threads")),
        copy_bytes_per_second=limits.positive("copy_bytes_per_second"),
        matrix_flops_per_second=_positives(limits.object("matrix_flops_per_second")),
        peak=Peak(
            name=peak.optional_text("name"),
            flops=_positives(peak.optional_object("flops")),
            bandwidth=peak.optional_number("bandwidth"),
            source=peak.optional_text("source"),
        ),
        peers={name: peers.optional_text(name) for name in peers.value},
    )


def _positives(data: Fields) -> dict[str, float]:
    return {name: data.positive(name) for name in data.value}


def _row(data: Fields, source: Source) -> Row:
    dims = data.object("dims")
    plain: dict[str, Any] = {name: data.text(name) for name in ("suite", "case", "mode", "provider", "dtype")}
    plain |= {name: data.optional_number(name) for name in _OPTIONAL_NUMBERS}
    return Row(
        **plain,
        dims={name: dims.get(name, (int, str), "a whole number or a text") for name in dims.value},
        seconds=_spread(data.object("seconds")),
        host_seconds=None if data.value.get("host_seconds") is None else _spread(data.object("host_seconds")),
        source=source,
    )


def _spread(data: Fields) -> Spread:
    spread = Spread(*(data.positive(name) for name in ("p20", "median", "p80")))
    if not spread.p20 <= spread.median <= spread.p80:
        raise FieldError(f"{data.where} is not in order; accepted: p20 <= median <= p80")
    return spread
