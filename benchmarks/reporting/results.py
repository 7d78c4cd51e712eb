"""Results files, checked and merged into one table.

A file is pytest-benchmark's JSON with additions: `gptfast_results`, `machine_info.gptfast`, `not_measured`, and in each
benchmark's `extra_info` one row of the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

from pandas import DataFrame
from pydantic import (
    AliasPath,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    create_model,
    model_validator,
)

from benchmarks import RESULTS_FORMAT
from benchmarks.reporting.names import KEY, sort_order

NUMBERS = (
    *("error", "peak_bytes", "flops", "bytes", "flops_per_second", "bytes_per_second", "matrix_share", "copy_share"),
    *("roofline_seconds", "tokens_per_second", "mfu", "mfu_causal"),
    *("seconds_to_first_token", "seconds_per_token", "bytes_per_token", "mbu"),
)
COLUMNS = [*KEY, "dtype", "dims", "p20", "median", "p80", "host_median", *NUMBERS, "source"]
Positive = Annotated[FiniteFloat, Field(gt=0)]
_key = itemgetter(*KEY)


class ResultsError(ValueError):
    """Unusable results. The message is one line: the file, the field, what is accepted and what was given."""


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


def _at(*path: str, **default: Any) -> Any:
    """Field at a nested place of the JSON."""
    return Field(validation_alias=AliasPath(*path), **default)


class Machine(_Fields):
    """Device and versions of a run, limits measured at its start, and the device's data sheet.

    `peak_name` is None for a GPU that `gptfast.hardware` does not list. Rates are in FLOP/s by dtype and in bytes/s.
    """

    device: str
    slug: str
    kind: str
    torch: str
    gptfast: str
    python: str
    threads: int
    copy_rate: Positive = _at("limits", "copy_bytes_per_second")
    matmul_rates: dict[str, Positive] = _at("limits", "matrix_flops_per_second")
    peak_name: str | None = _at("peak", "name", default=None)
    peak_rates: dict[str, Positive] | None = _at("peak", "flops", default=None)
    peak_bandwidth: float | None = _at("peak", "bandwidth", default=None)
    peak_source: str | None = _at("peak", "source", default=None)
    peers: dict[str, str | None] | None = None
    driver: str | None = None
    cuda: str | None = None
    triton: str | None = None


class _Key(_Fields):
    suite: str
    case: str
    mode: str
    provider: str


class _NotMeasured(_Key):
    reason: str


class _Measured(_Key):
    dtype: str
    dims: dict[str, int | str]
    p20: Positive = _at("seconds", "p20")
    median: Positive = _at("seconds", "median")
    p80: Positive = _at("seconds", "p80")
    host_median: Positive | None = _at("host_seconds", "median", default=None)

    @model_validator(mode="after")
    def _is_ordered(self) -> _Measured:
        if not self.p20 <= self.median <= self.p80:
            raise ValueError("seconds are not in order; accepted: p20 <= median <= p80")
        return self


_Row: Any = create_model("_Row", __base__=_Measured, **dict.fromkeys(NUMBERS, (float | None, None)))  # type: ignore[call-overload]


class _Benchmark(_Fields):
    extra_info: _Row


class File(_Fields):
    """A results file."""

    gptfast_results: Annotated[int, Field(ge=RESULTS_FORMAT, le=RESULTS_FORMAT)]
    machine: Machine = _at("machine_info", "gptfast")
    commit: str = _at("commit_info", "id")
    dirty: bool = _at("commit_info", "dirty")
    measured: datetime = Field(alias="datetime")
    benchmarks: list[_Benchmark]
    not_measured: list[_NotMeasured]
    path: str = ""

    @property
    def when(self) -> datetime:
        """Time of the measurement in UTC."""
        return (self.measured if self.measured.tzinfo else self.measured.replace(tzinfo=UTC)).astimezone(UTC)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Measurements with the fields of `COLUMNS`."""
        return [dict(benchmark.extra_info) | {"source": self.path} for benchmark in self.benchmarks]


@dataclass(frozen=True)
class Results:
    """Results of one device.

    Attributes:
        machine: device and versions of the newest file with measurements.
        files: oldest first.
        rows: measurements in the report's order, with `COLUMNS`: times are in seconds, `source` is the file's path, and
            NaN is a number that does not apply. The newest of repeated measurements counts.
        not_measured: measurements that no file has, with `KEY` and `reason`.
        problems: one line for each file that was rejected.
    """

    machine: Machine
    files: list[File]
    rows: DataFrame
    not_measured: DataFrame
    problems: list[str]

    @property
    def used_files(self) -> list[File]:
        """Files that rows come from, newest first; the newest file if there are no rows."""
        used = set(self.rows["source"])
        return [file for file in reversed(self.files) if file.path in used] or [self.files[-1]]


def device_folders(results_folder: str | Path) -> list[Path]:
    """List the folders of devices that have results."""
    root = Path(results_folder)
    if not root.is_dir():
        raise ResultsError(f"{root}: no such folder; accepted: a folder with one folder of *.json for each device")
    return sorted(folder for folder in root.iterdir() if any(folder.glob("*.json")))


def load(path: str | Path) -> Results:
    """Load a results file, or merge those of a device's folder.

    A folder holds one device: the one it is named after, else that of the newest file. Rejected files become
    `problems`.

    Raises:
        ResultsError: nothing usable.
    """
    if not Path(path).is_dir():
        return _merge([_read(path)], [])
    files, problems = [], []
    for name in sorted(Path(path).glob("*.json")):
        try:
            files.append(_read(name))
        except ResultsError as error:
            problems.append(str(error))
    if not files:
        raise ResultsError(f"{path}: no results in this folder: {'; '.join(problems) or 'it has no *.json'}")
    files.sort(key=lambda file: file.when)
    device = ([file for file in files if file.machine.slug == Path(path).name] or files)[-1].machine.device
    for file in files:
        if file.machine.device != device:
            problems.append(f"{file.path}: measured on {file.machine.device}; accepted in its folder: {device}")
    return _merge([file for file in files if file.machine.device == device], problems)


def _merge(files: list[File], problems: list[str]) -> Results:
    """Merge files of one device, oldest first."""
    rows = {_key(row): row for file in files for row in file.rows}
    missing = {_key(row): row for file in files for row in map(dict, file.not_measured)}
    table = DataFrame(sorted(rows.values(), key=sort_order), columns=COLUMNS)
    absent = DataFrame([row for key, row in missing.items() if key not in rows], columns=[*KEY, "reason"])
    # a file of another kind, such as learning curves, may be newer than the measurements
    measured = [file for file in files if file.benchmarks or file.not_measured] or files
    numbers = dict.fromkeys([*NUMBERS, "host_median"], float)
    return Results(measured[-1].machine, files, table.astype(numbers), absent, problems)


def _read(path: str | Path) -> File:
    """Read and check one file.

    Raises:
        ResultsError: unreadable, not JSON, not a results file, or a field is missing or wrong.
    """
    try:
        file = File.model_validate_json(Path(path).read_bytes()).model_copy(update={"path": str(path)})
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read: {error.strerror}; accepted: a results file or a folder") from None
    except ValidationError as error:
        raise ResultsError(f"{path}: {_first_error(error)}") from None
    keys = [_key(row) for row in file.rows]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ResultsError(f"{path}: benchmarks measures {', '.join(twice[0])} twice; accepted: once per file")
    return file


def _first_error(error: ValidationError) -> str:
    """Format pydantic's first complaint as one line: the field, what is accepted, what was given."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"{first['msg']}; accepted: a whole results file"
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    given = "" if first["type"] == "missing" else f", got {json.dumps(first['input'], default=str)[:40]}"
    return f"{where or 'the file'}: {first['msg']}{given}"
