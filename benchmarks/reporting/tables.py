"""Tables of a report, the same for Markdown and HTML: texts in rows, the rows in groups under headings."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC

from benchmarks.reporting import ratios, units
from benchmarks.reporting.rows import BASELINE, MODEL_SUITES, MODES, SUITES, Row, Run, Source

Line = tuple[str, ...]
Column = tuple[str, Callable[[Row], object], Callable[[Row], str]]


@dataclass(frozen=True)
class Table:
    """`groups` maps headings to lines; `grouping` says what the headings are. `name` is unique in a report."""

    name: str
    title: str
    grouping: str
    columns: Line
    groups: dict[str, list[Line]]
    texts: tuple[str, ...] = ()  # columns that are words, not numbers


def model_summary(run: Run) -> list[Table]:
    """How many times as fast as eager and each named peer gptfast's backends are, per model suite."""
    tables = []
    for suite in MODEL_SUITES:
        rows = [row for row in run.rows if row.suite == suite]
        others = [
            *([BASELINE] if any(row.provider == BASELINE for row in rows) else []),
            *ratios.model_peers(run, suite),
        ]
        groups: dict[str, list[Line]] = defaultdict(list)
        for (_, case, _, _), providers in ratios.cases(rows).items():
            for name in ratios.own(suite):
                found = [
                    ratios.Ratio(providers[name], providers[other]).value
                    if name in providers and other in providers and other != name
                    else None
                    for other in others
                ]
                if any(value is not None for value in found):
                    groups[case].append((name, *map(units.ratio, found)))
        if groups:
            title = f"{SUITES[suite]}: times as fast as"
            tables.append(Table(f"summary-{suite}", title, "case", ("gptfast", *others), dict(groups)))
    return tables


def operator_summary(run: Run) -> Table | None:
    """Best and worst ratio of each operator against eager and against the best peer; None without Triton rows."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for suite, mode in dict.fromkeys((row.suite, row.mode) for row in run.rows if row.suite not in MODEL_SUITES):
        rows = [row for row in run.rows if (row.suite, row.mode) == (suite, mode)]
        for name in ratios.own(suite):
            for standing in ratios.standings(rows, name):
                faster = sum(not units.is_loss(ratio.value) for ratio in standing.ratios)
                line = (
                    f"{MODES.get(mode, mode)} vs {standing.against}",
                    *(units.ratio(standing.worst.value), _where(standing, standing.worst)),
                    *(units.ratio(standing.best.value), _where(standing, standing.best)),
                    f"{faster} of {len(standing.ratios)}",
                )
                groups[f"{SUITES.get(suite, suite)}, {name}"].append(line)
    if not groups:
        return None
    columns = ("comparison", "worst", "in case", "best", "in case", "not slower in")
    title = "Operators: worst and best case"
    return Table("summary-operators", title, "operator", columns, dict(groups), texts=("in case",))


def _where(standing: ratios.Standing, ratio: ratios.Ratio) -> str:
    return ratio.row.case + (f" ({ratio.other.provider})" if standing.against == ratios.BEST_PEER else "")


def model_tables(run: Run) -> list[Table]:
    """Speed, time, memory and use of the hardware of each model suite."""
    tables = []
    for suite in MODEL_SUITES:
        rows = [row for row in run.rows if row.suite == suite]
        what = "step" if suite == "training" else "run"
        columns: list[Column] = [
            ("tokens/s", lambda row: row.tokens_per_second, lambda row: units.count(row.tokens_per_second)),
            (f"{what}, p20", lambda row: row.seconds, lambda row: units.seconds(row.seconds.p20)),
            ("median", lambda row: row.seconds, lambda row: units.seconds(row.seconds.median)),
            ("p80", lambda row: row.seconds, lambda row: units.seconds(row.seconds.p80)),
            (
                "first token",
                lambda row: row.seconds_to_first_token,
                lambda row: units.seconds(row.seconds_to_first_token),
            ),
            ("per token", lambda row: row.seconds_per_token, lambda row: units.seconds(row.seconds_per_token)),
            ("read per token", lambda row: row.bytes_per_token, lambda row: units.size(row.bytes_per_token)),
            ("MBU", lambda row: row.mbu, lambda row: units.share(row.mbu)),
            ("peak memory", lambda row: row.peak_bytes, lambda row: units.size(row.peak_bytes)),
            ("of roofline", lambda row: row.roofline_seconds, _of_roofline),
            ("MFU (PaLM)", lambda row: row.mfu, lambda row: units.share(row.mfu)),
            ("MFU (causal)", lambda row: row.mfu_causal, lambda row: units.share(row.mfu_causal)),
            ("error", lambda row: row.error, lambda row: units.error(row.error)),
        ]
        if rows:
            tables.append(_table(f"{suite}-table", SUITES[suite], rows, columns))
    return tables


def kernel_tables(run: Run, suite: str) -> list[Table]:
    """One table for each mode of an operator."""
    tables = []
    for mode in dict.fromkeys(row.mode for row in run.rows if row.suite == suite):
        rows = [row for row in run.rows if (row.suite, row.mode) == (suite, mode)]
        columns: list[Column] = [
            ("median time", lambda row: row.seconds, lambda row: units.seconds(row.seconds.median)),
            ("p20", lambda row: row.seconds, lambda row: units.seconds(row.seconds.p20)),
            ("p80", lambda row: row.seconds, lambda row: units.seconds(row.seconds.p80)),
            ("host time", lambda row: row.host_seconds, _host),
            *_rates(rows),
            ("error", lambda row: row.error, lambda row: units.error(row.error)),
            ("extra memory", lambda row: row.peak_bytes, lambda row: units.size(row.peak_bytes)),
        ]
        title = f"{SUITES.get(suite, suite)}, {MODES.get(mode, mode)}"
        tables.append(_table(f"{suite}-{mode}-table", title, rows, columns))
    return tables


def _of_roofline(row: Row) -> str:
    """The share of the measured time that the roofline leaves no way around."""
    return units.share(None if row.roofline_seconds is None else row.roofline_seconds / row.seconds.median)


def _host(row: Row) -> str:
    return units.seconds(None if row.host_seconds is None else row.host_seconds.median)


def _rates(rows: list[Row]) -> list[Column]:
    """The rate whose limit binds in most cases, and the share of that limit that is reached."""
    bound = Counter(_copy_binds(row) for row in rows)
    if bound[True] >= bound[False]:
        return [
            ("throughput", lambda row: row.bytes_per_second, lambda row: units.bandwidth(row.bytes_per_second)),
            ("of copy rate", lambda row: row.copy_share, lambda row: units.share(row.copy_share)),
        ]
    return [
        ("throughput", lambda row: row.flops_per_second, lambda row: units.compute(row.flops_per_second)),
        ("of matrix rate", lambda row: row.matrix_share, lambda row: units.share(row.matrix_share)),
    ]


def _copy_binds(row: Row) -> bool:
    machine = row.source.machine
    matrix = machine.matrix_flops_per_second.get(row.dtype)
    if matrix is None or row.flops is None or row.bytes is None:
        return True
    return row.bytes / machine.copy_bytes_per_second >= row.flops / matrix


def _table(name: str, title: str, rows: list[Row], columns: list[Column]) -> Table:
    """Rows by case; columns for which no row has a value are left out."""
    speed_ups = ratios.speed_ups(rows)
    columns = [column for column in columns if any(column[1](row) is not None for row in rows)]
    if speed_ups:
        over_eager: Column = ("over eager", lambda row: speed_ups.get(row.key), lambda row: _over(speed_ups, row))
        columns.insert(1, over_eager)
    groups: dict[str, list[Line]] = defaultdict(list)
    for row in rows:
        groups[row.case].append((row.provider, *(text(row) for _, _, text in columns)))
    return Table(name, title, "case", ("provider", *(heading for heading, _, _ in columns)), dict(groups))


def _over(speed_ups: dict[tuple[str, str, str, str], ratios.Ratio], row: Row) -> str:
    ratio = speed_ups.get(row.key)
    return units.ratio(None if ratio is None else ratio.value)


def not_measured(run: Run) -> list[tuple[int, str, str]]:
    """Identical reasons folded: how many measurements, of what, and why; the commonest reason first."""
    reasons: dict[str, list] = defaultdict(list)
    for item in run.not_measured:
        reasons[" ".join(item.reason.split())].append(item)
    lines = []
    for reason, items in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        what: dict[tuple[str, str], list[str]] = defaultdict(list)
        for item in items:
            what[item.suite, item.provider].append(MODES.get(item.mode, item.mode))
        texts = [
            f"{SUITES.get(suite, suite)}: {provider}, {' and '.join(dict.fromkeys(modes))}"
            for (suite, provider), modes in what.items()
        ]
        lines.append((len(items), "; ".join(texts), reason))
    return lines


def date(source: Source) -> str:
    """When a file was measured, in UTC."""
    return source.when.astimezone(UTC).strftime("%Y-%m-%d %H:%M")


def sources(run: Run) -> Table:
    """Which file each row comes from, and with what it was measured."""
    rows = Counter(row.source.path for row in run.rows)
    lines: list[Line] = [
        (
            *(source.path.rpartition("/")[2], date(source), source.commit[:10]),
            *("yes" if source.dirty else "no", source.machine.torch, source.machine.triton or units.NOTHING),
            str(rows[source.path]),
        )
        for source in reversed(run.sources)
    ]
    columns = ("file", "measured (UTC)", "commit", "uncommitted changes", "PyTorch", "Triton", "rows shown")
    return Table("sources", "Files", "", columns, {"": lines}, texts=columns[1:-1])


def suites(rows: Iterable[Row]) -> list[str]:
    """The operators that were measured, in order."""
    return list(dict.fromkeys(row.suite for row in rows if row.suite not in MODEL_SUITES))
