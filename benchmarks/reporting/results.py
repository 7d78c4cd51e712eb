"""Results files, checked and merged into one table.

A file is pytest-benchmark's JSON with additions: `gptfast_results`, `machine_info.gptfast`, `not_measured`, and in each
benchmark's `extra_info` one row of the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pandas import DataFrame
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, create_model, model_validator

from benchmarks import RESULTS_FORMAT
from benchmarks.reporting.names import KEY, sort_order

NUMBERS = (
    *("error", "peak_bytes", "flops", "bytes", "flops_per_second", "bytes_per_second", "matrix_share", "copy_share"),
    *("roofline_seconds", "tokens_per_second", "mfu", "mfu_causal"),
    *("seconds_to_first_token", "seconds_per_token", "bytes_per_token", "mbu"),
)
COLUMNS = [*KEY, "dtype", "dims", "p20", "median", "p80", "host_median", *NUMBERS, "source"]
Positive = Annotated[FiniteFloat, Field(gt=0)]


class ResultsError(ValueError):
    """Unusable results. The message is one line: the file, the field, what is accepted and what was given."""


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Peak(_Fields):
    """Data sheet of a device; `name` is None for a GPU that `gptfast.hardware` does not list."""

    name: str | None = None
    flops: dict[str, Positive] | None = None
    bandwidth: float | None = None
    source: str | None = None


class Limits(_Fields):
    """Rates measured at the start of a run."""

    copy_bytes_per_second: Positive
    matrix_flops_per_second: dict[str, Positive]


class Machine(_Fields):
    """Device and versions of a run."""

    device: str
    slug: str
    kind: str
    torch: str
    gptfast: str
    python: str
    threads: int
    limits: Limits
    peak: Peak
    peers: dict[str, str | None] | None = None
    driver: str | None = None
    cuda: str | None = None
    triton: str | None = None


class _Spread(_Fields):
    p20: Positive
    median: Positive
    p80: Positive

    @model_validator(mode="after")
    def _ordered(self) -> _Spread:
        if not self.p20 <= self.median <= self.p80:
            raise ValueError("accepted: p20 <= median <= p80")
        return self


class _Key(_Fields):
    suite: str
    case: str
    mode: str
    provider: str


class _Measured(_Key):
    dtype: str
    dims: dict[str, int | str]
    seconds: _Spread
    host_seconds: _Spread | None = None


_Row: Any = create_model("_Row", __base__=_Measured, **dict.fromkeys(NUMBERS, (float | None, None)))  # type: ignore[call-overload]


class _NotMeasured(_Key):
    reason: str


class _MachineInfo(_Fields):
    gptfast: Machine


class _Commit(_Fields):
    id: str
    dirty: bool


class _Benchmark(_Fields):
    extra_info: _Row


class File(_Fields):
    """A results file."""

    gptfast_results: Annotated[int, Field(ge=RESULTS_FORMAT, le=RESULTS_FORMAT)]
    machine_info: _MachineInfo
    commit_info: _Commit
    measured: datetime = Field(alias="datetime")
    benchmarks: list[_Benchmark]
    not_measured: list[_NotMeasured]
    path: str = ""

    @property
    def when(self) -> datetime:
        """Time of the measurement in UTC."""
        return (self.measured if self.measured.tzinfo else self.measured.replace(tzinfo=UTC)).astimezone(UTC)

    @property
    def commit(self) -> str:
        """Ten digits of the commit."""
        return self.commit_info.id[:10]


@dataclass(frozen=True)
class Results:
    """Results of one device.

    Attributes:
        machine: device and versions of the newest file with measurements.
        files: oldest first.
        rows: measurements in the report's order, with `COLUMNS`: times are in seconds, `source` is the file's path, and
            NaN is a number that does not apply.
        not_measured: missing measurements, with `KEY` and `reason`.
        problems: one line for each file that was rejected.
    """

    machine: Machine
    files: tuple[File, ...]
    rows: DataFrame
    not_measured: DataFrame
    problems: tuple[str, ...] = ()

    @property
    def used_files(self) -> list[File]:
        """Files that rows come from, newest first; the newest file if there are no rows."""
        used = set(self.rows["source"])
        return [file for file in reversed(self.files) if file.path in used] or [self.files[-1]]


def load(path: str | Path) -> Results:
    """Load a results file, or merge those of a device's folder.

    A folder holds one device: the one it is named after, else that of the newest file. Rejected files become
    `problems`.

    Raises:
        ResultsError: nothing usable.
    """
    if not Path(path).is_dir():
        return load_file(path)
    runs, problems = [], []
    for file in sorted(Path(path).glob("*.json")):
        try:
            runs.append(load_file(file))
        except ResultsError as error:
            problems.append(str(error))
    if not runs:
        raise ResultsError(f"{path}: no results in this folder: {'; '.join(problems) or 'it has no *.json'}")
    named = [run for run in runs if run.machine.slug == Path(path).name]
    device = max(named or runs, key=lambda run: run.files[-1].when).machine.device
    for run in runs:
        if run.machine.device != device:
            where = run.files[-1].path
            problems.append(f"{where}: measured on {run.machine.device}; accepted in its folder: {device}")
    return replace(merge(run for run in runs if run.machine.device == device), problems=tuple(problems))


def merge(runs: Iterable[Results]) -> Results:
    """Merge results of one device. The newest of repeated measurements counts.

    Raises:
        ResultsError: several devices, or none.
    """
    ordered = sorted(runs, key=lambda run: run.files[-1].when)
    devices = sorted({run.machine.device for run in ordered})
    if len(devices) != 1:
        raise ResultsError(f"cannot merge results of {' and '.join(devices) or 'nothing'}; accepted: one device")
    # a file of another kind, such as learning curves, may be newer than the measurements
    measured = [run for run in ordered if len(run.rows) or len(run.not_measured)] or ordered
    files = tuple(file for run in ordered for file in run.files)
    rows, missing = (pd.concat([getattr(run, name) for run in measured]) for name in ("rows", "not_measured"))
    return _results(measured[-1].machine, files, rows, missing)


def load_file(path: str | Path) -> Results:
    """Load one file.

    Raises:
        ResultsError: unreadable, not JSON, not a results file, or a field is missing or wrong.
    """
    try:
        file = File.model_validate_json(Path(path).read_bytes()).model_copy(update={"path": str(path)})
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}; accepted: a results file or a folder") from None
    except ValidationError as error:
        raise ResultsError(f"{path}: {_first_error(error)}") from None
    rows = DataFrame([_flat(benchmark.extra_info, file) for benchmark in file.benchmarks], columns=COLUMNS)
    if twice := rows[rows.duplicated(KEY)][KEY].values.tolist():
        raise ResultsError(f"{path}: benchmarks measures {', '.join(twice[0])} twice; accepted: once per file")
    missing = DataFrame([dict(item) for item in file.not_measured], columns=[*KEY, "reason"])
    return _results(file.machine_info.gptfast, (file,), rows, missing)


def _flat(row: Any, file: File) -> dict[str, Any]:
    host = row.host_seconds.median if row.host_seconds else None
    return dict(row) | dict(row.seconds) | {"host_median": host, "source": file.path}


def _results(machine: Machine, files: tuple[File, ...], rows: DataFrame, missing: DataFrame) -> Results:
    """Keep the last of repeated lines, and only what is missing in all of `rows`."""
    rows = rows.drop_duplicates(KEY, keep="last").astype(dict.fromkeys([*NUMBERS, "host_median"], float))
    order = sorted((sort_order(row), number) for number, row in enumerate(rows.to_dict("records")))
    missing = missing.drop_duplicates(KEY, keep="last").merge(rows[KEY], how="left_anti", on=KEY)
    return Results(machine, files, rows.iloc[[number for _, number in order]].reset_index(drop=True), missing)


def _first_error(error: ValidationError) -> str:
    """Format pydantic's first complaint as one line: the field, what is accepted, what was given."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"{first['msg']}; accepted: a whole results file"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    given = "" if first["type"] == "missing" else f", got {json.dumps(first['input'], default=str)[:40]}"
    return f"{where or 'the file'}: {first['msg']}{given}"
