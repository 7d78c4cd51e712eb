"""Content of a report, shared by its Markdown and its HTML: facts, ratios and tables of text."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pandas import DataFrame

from benchmarks.reporting import ratios, units
from benchmarks.reporting.names import MODEL_SUITES, MODES, SUITES, title
from benchmarks.reporting.ratios import BEST_PEER
from benchmarks.reporting.results import Machine, Results

Line = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Lines of text in groups.

    Attributes:
        name: unique in a report.
        title: heading.
        columns: headings.
        groups: lines by the groups' headings.
        grouping: what the groups are, such as "case"; empty if there is one group without a heading.
        texts: columns of words, which are left-aligned.
    """

    name: str
    title: str
    columns: Line
    groups: dict[str, list[Line]]
    grouping: str = "case"
    texts: Line = ()


def content(run: Results, folder: Path) -> dict[str, Any]:
    """Gather what both templates show of a device whose files are in `folder`."""
    tables: dict[str, list[Table]] = defaultdict(list)
    for (suite, _), rows in run.rows.groupby(["suite", "mode"], sort=False):
        tables[suite].append(measurements(rows))
    return {
        "device": run.machine.device,
        "kind": run.machine.kind,
        "headline": headline(run),
        "warnings": warnings(run, folder),
        "leads": leads(run.rows),
        "summary": [*model_summaries(run.rows), *operator_summaries(run.rows)],
        "tables": dict(tables),
        "suites": {suite: SUITES.get(suite, suite) for suite in tables},
        "model_suites": [suite for suite in MODEL_SUITES if suite in tables],
        "has_mfu": bool(run.rows["mfu"].notna().any()),
        "not_measured": not_measured(run.not_measured),
        "sources": sources(run),
    }


def headline(run: Results) -> dict[str, str]:
    """Device, versions, commits, date, measured rates and data sheet; what is unknown is left out."""
    machine, limits, peak = run.machine, run.machine.limits, run.machine.peak
    matmul = {f"{dtype} matmul": rate for dtype, rate in limits.matrix_flops_per_second.items()}
    sheet = f"{'CPU' if machine.kind == 'cpu' else 'unknown GPU'}: no peak, MFU not given"
    if peak.name is not None:
        memory = [] if peak.bandwidth is None else [f"memory {units.bandwidth(peak.bandwidth)}"]
        sheet = f"{peak.name}: {', '.join([*_rates(peak.flops or {}), *memory])}"
        sheet += f"; source: {peak.source}" if peak.source else ""
    facts = {
        "Device": machine.device + (f", driver {machine.driver}" if machine.driver else ""),
        "Versions": versions(machine),
        "Peers": ", ".join(f"{name} {version or 'not installed'}" for name, version in (machine.peers or {}).items()),
        "Commit": commits(run),
        "Measured": f"{run.used_files[0].when:%Y-%m-%d %H:%M} UTC",
        "Measured limits": ", ".join([f"copy {units.bandwidth(limits.copy_bytes_per_second)}", *_rates(matmul)]),
        "Data sheet" if machine.kind == "cuda" else "Peak": sheet,
    }
    return {name: text for name, text in facts.items() if text}


def _rates(rates: dict[str, float]) -> list[str]:
    return [f"{name} {units.compute(rate)}" for name, rate in rates.items()]


def versions(machine: Machine) -> str:
    """Versions of gptfast, PyTorch and what they ran on."""
    known = {"gptfast": machine.gptfast, "PyTorch": machine.torch, "Triton": machine.triton, "CUDA": machine.cuda}
    known["Python"] = machine.python
    return ", ".join(f"{name} {version}" for name, version in known.items() if version) + f", {machine.threads} threads"


def commits(run: Results) -> str:
    """Commits that the rows were measured at, newest first."""
    dirty = {True: " with uncommitted changes", False: ""}
    return " and ".join(dict.fromkeys(file.commit + dirty[file.commit_info.dirty] for file in run.used_files))


def warnings(run: Results, folder: Path) -> list[str]:
    """Reasons to read the figures with care."""
    lines = [f"Not read: {problem.replace(f'{folder}/', '')}" for problem in run.problems]
    used = set(run.rows["source"])
    if dirty := sorted(Path(file.path).name for file in run.files if file.commit_info.dirty and file.path in used):
        lines.append(f"Measured with uncommitted changes: {', '.join(dirty)}.")
    if (main := ratios.main_provider(run.rows)) != "triton":
        lines.append(f"Triton was not measured on this device: gptfast's figures are those of its {main} backend.")
    return lines


def leads(rows: DataFrame) -> list[tuple[str, list[str], str]]:
    """Label, worst and best ratio, and detail of gptfast against eager and each peer, for each model suite."""
    main, found = ratios.main_provider(rows), []
    for suite in MODEL_SUITES:
        of_suite = rows[rows["suite"] == suite]
        for other, values in ratios.against_each(ratios.of_provider(of_suite, main), of_suite).items():
            cases = "1 case" if values.count() == 1 else f"{values.count()} cases"
            found.append((f"{SUITES[suite]} vs {other}", span(values), f"{main}, {cases}"))
    return found


def span(values: Any) -> list[str]:
    """Format the worst and the best ratio, or the only one."""
    return list(dict.fromkeys((units.ratio(values.min()), units.ratio(values.max()))))


def model_summaries(rows: DataFrame) -> list[Table]:
    """Tabulate the ratios of gptfast's backends to the baseline and to each peer, by model suite."""
    tables = []
    for suite, of_suite in rows[rows["suite"].isin(MODEL_SUITES)].groupby("suite", sort=False):
        own = ratios.own(of_suite)
        found = ratios.against_each(own, of_suite).dropna(how="all").map(units.ratio)
        groups: dict[str, list[Line]] = defaultdict(list)
        for index, *cells in found.itertuples():
            groups[own["case"][index]].append((own["provider"][index], *cells))
        if groups:
            columns = ("gptfast", *found.columns)
            tables.append(Table(f"summary-{suite}", f"{SUITES[suite]}: times as fast as", columns, dict(groups)))
    return tables


def operator_summaries(rows: DataFrame) -> list[Table]:
    """Tabulate each operator's worst and best ratio to the baseline and to the best peer."""
    groups: dict[str, list[Line]] = defaultdict(list)
    operators = rows[~rows["suite"].isin(MODEL_SUITES)]
    for (suite, mode), of_mode in operators.groupby(["suite", "mode"], sort=False):
        for name in ratios.own(of_mode)["provider"].unique():
            for against, found in ratios.summaries(of_mode, name).items():
                line = [f"{MODES.get(mode, mode)} vs {against}"]
                for extreme in (found["ratio"].idxmin(), found["ratio"].idxmax()):
                    peer = f" ({found['other'][extreme]})" if against == BEST_PEER else ""
                    line += [units.ratio(found["ratio"][extreme]), found["case"][extreme] + peer]
                faster = sum(not units.is_slower(ratio) for ratio in found["ratio"])
                groups[f"{SUITES.get(suite, suite)}, {name}"].append((*line, f"{faster} of {len(found)}"))
    columns = ("comparison", "worst", "in case", "best", "in case", "not slower in")
    heading = "Operators: worst and best case"
    return [Table("summary-operators", heading, columns, dict(groups), "operator", ("in case",))] if groups else []


def measurements(rows: DataFrame) -> Table:
    """Tabulate one mode of a suite by case, without the columns that have no value.

    An operator's rate is bytes or FLOPs per second, whichever limit binds in most cases.
    """
    suite, mode, base = rows["suite"].iloc[0], rows["mode"].iloc[0], ratios.baseline(rows)
    is_model = suite in MODEL_SUITES
    by_bytes = {
        "throughput": ("bytes_per_second", units.bandwidth),
        "of copy rate": ("copy_share", units.share),
    }
    by_flops = {
        "throughput": ("flops_per_second", units.compute),
        "of matmul rate": ("matrix_share", units.share),
    }
    memory_bound = ~(rows["copy_share"] < rows["matrix_share"])
    rates = {} if is_model else by_bytes if memory_bound.mean() >= 0.5 else by_flops
    columns = {
        "tokens/s": ("tokens_per_second", units.count),
        "median": ("median", units.seconds),
        f"over {base}": ("ratio", units.ratio),
        "p20": ("p20", units.seconds),
        "p80": ("p80", units.seconds),
        "host time": ("host_median", units.seconds),
        **rates,
        "first token": ("seconds_to_first_token", units.seconds),
        "per token": ("seconds_per_token", units.seconds),
        "read per token": ("bytes_per_token", units.size),
        "MBU": ("mbu", units.share),
        "peak memory" if is_model else "extra memory": ("peak_bytes", units.size),
        **({"of roofline": ("roofline_share", units.share)} if is_model else {}),
        "MFU (PaLM)": ("mfu", units.share),
        "MFU (causal)": ("mfu_causal", units.share),
        "error": ("error", units.error),
    }
    rows = ratios.add_ratios(rows, ratios.of_provider(rows, base))
    rows = rows.assign(roofline_share=rows["roofline_seconds"] / rows["median"])
    columns = {heading: column for heading, column in columns.items() if rows[column[0]].notna().any()}
    groups: dict[str, list[Line]] = defaultdict(list)
    for row in rows.to_dict("records"):
        groups[row["case"]].append((row["provider"], *(text(row[column]) for column, text in columns.values())))
    return Table(f"{suite}-{mode}-table", title(suite, mode), ("provider", *columns), dict(groups))


def not_measured(missing: DataFrame) -> list[tuple[int, str, str]]:
    """Count, measurements and reason of what is missing; the commonest reason first."""
    lines = []
    for reason, items in missing.groupby(missing["reason"].str.split().str.join(" ")):
        parts = [
            f"{SUITES.get(suite, suite)}: {provider}, {' and '.join(MODES.get(mode, mode) for mode in modes.unique())}"
            for (suite, provider), modes in items.groupby(["suite", "provider"], sort=False)["mode"]
        ]
        lines.append((len(items), "; ".join(parts), reason))
    return sorted(lines, key=lambda line: -line[0])


def sources(run: Results) -> Table:
    """Tabulate the files with their versions and the number of rows shown, newest first."""
    rows = Counter(run.rows["source"])
    lines: list[Line] = []
    for file in reversed(run.files):
        machine, dirty = file.machine_info.gptfast, "yes" if file.commit_info.dirty else "no"
        facts = (Path(file.path).name, f"{file.when:%Y-%m-%d %H:%M}", file.commit, dirty)
        lines.append((*facts, machine.torch, machine.triton or units.NOTHING, str(rows[file.path])))
    columns = ("file", "measured (UTC)", "commit", "uncommitted changes", "PyTorch", "Triton", "rows shown")
    return Table("sources", "Files", columns, {"": lines}, "", texts=columns[1:-1])
