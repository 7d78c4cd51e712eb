"""Tables of a report: measurements, their ratios, and where they come from.

Ratios are of median times between providers of the same case, mode and file. Measurements of different files were not
taken in turns, and a machine's speed changes from hour to hour: they have no ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pandas import DataFrame, Series

from benchmarks.reporting import units
from benchmarks.reporting.names import MAIN, MODEL_SUITES, MODES, OWN, SUITES, title
from benchmarks.reporting.results import Machine, Results

BEST_PEER = "best peer"
_CASE = ["suite", "case", "mode", "source"]


class Table(NamedTuple):
    """A table of text, grouped by its index where that has a name; columns in `words` are left-aligned."""

    name: str
    title: str
    rows: DataFrame
    words: tuple[str, ...] = ()

    def groups(self) -> list[tuple[str, list[list[str]]]]:
        """Heading and lines of each group, or all lines under an empty heading."""
        if self.rows.index.name is None:
            return [("", self.rows.to_numpy().tolist())]
        return [(name, part.to_numpy().tolist()) for name, part in self.rows.groupby(level=0, sort=False)]


def main_provider(rows: DataFrame) -> str:
    """Backend that represents gptfast: the first of triton, cpu and eager that was measured."""
    return next((name for name in MAIN if (rows["provider"] == name).any()), "eager")


def baseline(rows: DataFrame) -> str:
    """Provider that all others are compared with: eager, or cpu where eager was not measured."""
    measured = set(rows["provider"])
    return "cpu" if "cpu" in measured and "eager" not in measured else "eager"


def is_own(rows: DataFrame) -> Series:
    """True for gptfast's providers: every backend of a model, and every operator's but plain PyTorch's."""
    plain = rows["provider"].str.startswith("eager") & ~rows["suite"].isin(MODEL_SUITES)
    return rows["provider"].isin(OWN) & ~plain


def peers(rows: DataFrame) -> DataFrame:
    """Rows of providers that are neither gptfast's nor the baseline."""
    return rows[~is_own(rows) & (rows["provider"] != baseline(rows))]


def add_ratios(rows: DataFrame, others: DataFrame) -> DataFrame:
    """Join to each row the ratio to the row of the same case in `others`, which has at most one.

    Returns:
        `rows` with `ratio` (the other's median over this one's, above 1 is faster), its bounds `low` and `high` by p20
        and p80, and `other`, the other's provider. NaN where the case has no other.
    """
    theirs = rows[_CASE].merge(others, how="left", on=_CASE).set_index(rows.index)
    ratio, low, high = theirs["median"] / rows["median"], theirs["p20"] / rows["p80"], theirs["p80"] / rows["p20"]
    return rows.assign(ratio=ratio, low=low, high=high, other=theirs["provider"])


def ratios_to_each(rows: DataFrame, suite: DataFrame) -> DataFrame:
    """Ratios of `rows` to the baseline and the peers of their suite, one column for each that was measured."""
    ratios = {}
    for other in [baseline(suite), *sorted(peers(suite)["provider"].unique())]:
        ratio = add_ratios(rows, suite[suite["provider"] == other])["ratio"]
        ratios[other] = ratio.mask(rows["provider"] == other)
    return DataFrame(ratios, rows.index).dropna(axis="columns", how="all")


def summaries(rows: DataFrame, provider: str) -> dict[str, DataFrame]:
    """Rows of `provider` with ratios, in one suite and mode, to the baseline and to the best peer of each case."""
    ours, base, others = rows[rows["provider"] == provider], baseline(rows), peers(rows)
    best = others.loc[others.groupby(_CASE)["median"].idxmin()]
    found = {base: add_ratios(ours, rows[rows["provider"] == base]), BEST_PEER: add_ratios(ours, best)}
    return {name: part.dropna(subset="ratio") for name, part in found.items() if part["ratio"].notna().any()}


def span(ratios: Any) -> list[str]:
    """Format the worst and the best ratio, or the only one."""
    return list(dict.fromkeys((units.ratio(ratios.min()), units.ratio(ratios.max()))))


def content(run: Results, folder: Path) -> dict[str, Any]:
    """Gather what both templates show of a device whose files are in `folder`."""
    tables: dict[str, list[Table]] = {}
    for (suite, _), rows in run.rows.groupby(["suite", "mode"], sort=False):
        tables.setdefault(suite, []).append(measurements(rows))
    return {
        "device": run.machine.device,
        "kind": run.machine.kind,
        "headline": headline(run),
        "warnings": warnings(run, folder),
        "leads": leads(run.rows),
        "summary": [*model_summaries(run.rows), *operator_summaries(run.rows)],
        "tables": tables,
        "suites": {suite: SUITES.get(suite, suite) for suite in tables},
        "model_suites": [suite for suite in MODEL_SUITES if suite in tables],
        "has_mfu": bool(run.rows["mfu"].notna().any()),
        "not_measured": not_measured(run.not_measured),
        "sources": sources(run),
    }


def headline(run: Results) -> dict[str, str]:
    """Device, versions, commits, date, measured rates and data sheet; what is unknown is left out."""
    machine, copy = run.machine, units.bandwidth(run.machine.copy_rate)
    matmuls = [f"{dtype} matmul {units.compute(rate)}" for dtype, rate in machine.matmul_rates.items()]
    sheet = f"{'CPU' if machine.kind == 'cpu' else 'unknown GPU'}: no peak, MFU not given"
    if machine.peak_name is not None:
        rates = [f"{dtype} {units.compute(rate)}" for dtype, rate in (machine.peak_rates or {}).items()]
        memory = [f"memory {units.bandwidth(machine.peak_bandwidth)}"] if machine.peak_bandwidth else []
        source = f"; source: {machine.peak_source}" if machine.peak_source else ""
        sheet = f"{machine.peak_name}: {', '.join(rates + memory)}{source}"
    facts = {
        "Device": machine.device + (f", driver {machine.driver}" if machine.driver else ""),
        "Versions": versions(machine),
        "Peers": ", ".join(f"{name} {version or 'not installed'}" for name, version in (machine.peers or {}).items()),
        "Commit": commits(run),
        "Measured": f"{run.used_files[0].when:%Y-%m-%d %H:%M} UTC",
        "Measured limits": ", ".join([f"copy {copy}", *matmuls]),
        "Data sheet" if machine.kind == "cuda" else "Peak": sheet,
    }
    return {name: text for name, text in facts.items() if text}


def versions(machine: Machine) -> str:
    """Versions of gptfast, PyTorch and what they ran on."""
    known = {"gptfast": machine.gptfast, "PyTorch": machine.torch, "Triton": machine.triton, "CUDA": machine.cuda}
    known["Python"] = machine.python
    return ", ".join(f"{name} {version}" for name, version in known.items() if version) + f", {machine.threads} threads"


def commits(run: Results) -> str:
    """Commits that the rows were measured at, newest first."""
    dirty = {True: " with uncommitted changes", False: ""}
    return " and ".join(dict.fromkeys(file.commit[:10] + dirty[file.dirty] for file in run.used_files))


def origin(run: Results) -> str:
    """Versions, peers, date and commits in a line."""
    peers = "".join(f", {name} {version}" for name, version in (run.machine.peers or {}).items() if version)
    when = f"{run.used_files[0].when:%Y-%m-%d %H:%M} UTC"
    return f"{versions(run.machine)}{peers}; measured {when} at commit {commits(run)}"


def warnings(run: Results, folder: Path) -> list[str]:
    """Reasons to read the figures with care."""
    lines = [f"Not read: {problem.replace(f'{folder}/', '')}" for problem in run.problems]
    used = set(run.rows["source"])
    if dirty := sorted(Path(file.path).name for file in run.files if file.dirty and file.path in used):
        lines.append(f"Measured with uncommitted changes: {', '.join(dirty)}.")
    if (main := main_provider(run.rows)) != "triton":
        lines.append(f"Triton was not measured on this device: gptfast's figures are those of its {main} backend.")
    return lines


def leads(rows: DataFrame) -> list[tuple[str, list[str], str]]:
    """Label, worst and best ratio, and detail of gptfast against eager and each peer, for each model suite."""
    main, found = main_provider(rows), []
    for suite in MODEL_SUITES:
        of_suite = rows[rows["suite"] == suite]
        for other, ratios in ratios_to_each(of_suite[of_suite["provider"] == main], of_suite).items():
            cases = f"{ratios.count()} case{'s' if ratios.count() > 1 else ''}"
            found.append((f"{SUITES[suite]} vs {other}", span(ratios), f"{main}, {cases}"))
    return found


def model_summaries(rows: DataFrame) -> Iterator[Table]:
    """Tabulate the ratios of gptfast's backends to the baseline and to each peer, by model suite."""
    for suite, of_suite in rows[rows["suite"].isin(MODEL_SUITES)].groupby("suite", sort=False):
        own = of_suite[is_own(of_suite)]
        ratios = ratios_to_each(own, of_suite).dropna(how="all").map(units.ratio)
        if len(ratios):
            own = own.loc[ratios.index]
            table = pd.concat([own["provider"].rename("gptfast"), ratios], axis="columns").set_axis(own["case"])
            yield Table(f"summary-{suite}", f"{SUITES[suite]}: times as fast as", table)


def operator_summaries(rows: DataFrame) -> Iterator[Table]:
    """Tabulate each operator's worst and best ratio to the baseline and to the best peer."""
    lines = []
    for (suite, mode), of_mode in rows[~rows["suite"].isin(MODEL_SUITES)].groupby(["suite", "mode"], sort=False):
        for name in of_mode[is_own(of_mode)]["provider"].unique():
            for against, found in summaries(of_mode, name).items():
                line = [f"{SUITES.get(suite, suite)}, {name}", f"{MODES.get(mode, mode)} vs {against}"]
                for extreme in (found["ratio"].idxmin(), found["ratio"].idxmax()):
                    row = found.loc[extreme]
                    peer = f" ({row['other']})" if against == BEST_PEER else ""
                    line += [units.ratio(row["ratio"]), row["case"] + peer]
                lines.append([*line, f"{sum(not units.is_slower(ratio) for ratio in found['ratio'])} of {len(found)}"])
    if lines:
        columns = ["operator", "comparison", "worst", "in case", "best", "in case", "not slower in"]
        table = DataFrame(lines, columns=columns).set_index("operator")
        yield Table("summary-operators", "Operators: worst and best case", table, ("in case",))


def measurements(rows: DataFrame) -> Table:
    """Tabulate one mode of a suite by case, without the columns that have no value.

    An operator's rate is bytes or FLOPs per second, whichever limit binds in most cases.
    """
    suite, mode, base = rows["suite"].iloc[0], rows["mode"].iloc[0], baseline(rows)
    is_model = suite in MODEL_SUITES
    by_bytes = {"throughput": ("bytes_per_second", units.bandwidth), "of copy rate": ("copy_share", units.share)}
    by_flops = {"throughput": ("flops_per_second", units.compute), "of matmul rate": ("matrix_share", units.share)}
    is_memory_bound = (~(rows["copy_share"] < rows["matrix_share"])).mean() >= 0.5
    columns = {
        "tokens/s": ("tokens_per_second", units.count),
        "median": ("median", units.seconds),
        f"over {base}": ("ratio", units.ratio),
        "p20": ("p20", units.seconds),
        "p80": ("p80", units.seconds),
        "host time": ("host_median", units.seconds),
        **({} if is_model else by_bytes if is_memory_bound else by_flops),
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
    rows = add_ratios(rows, rows[rows["provider"] == base]).set_index("case")
    rows = rows.assign(roofline_share=rows["roofline_seconds"] / rows["median"])
    cells = {heading: rows[name].map(text) for heading, (name, text) in columns.items() if rows[name].notna().any()}
    return Table(
        f"{suite}-{mode}-table", title(suite, mode), pd.concat({"provider": rows["provider"], **cells}, axis=1)
    )


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
    shown = run.rows["source"].value_counts()
    columns = ("file", "measured (UTC)", "commit", "uncommitted changes", "PyTorch", "Triton", "rows shown")
    lines = []
    for file in reversed(run.files):
        facts = (Path(file.path).name, f"{file.when:%Y-%m-%d %H:%M}", file.commit[:10], "yes" if file.dirty else "no")
        versions = (file.machine.torch, file.machine.triton or units.NOTHING)
        lines.append((*facts, *versions, str(shown.get(file.path, 0))))
    return Table("sources", "Files", DataFrame(lines, columns=columns), columns[1:-1])


def readme_lines(run: Results) -> Iterator[tuple[str, str, str]]:
    """Measurement, speed and ratios of the main backend: by case for models, over all cases for operators."""
    main = main_provider(run.rows)
    for (suite, mode), rows in run.rows.groupby(["suite", "mode"], sort=False):
        if suite not in MODEL_SUITES:
            found = {other: span(against["ratio"]) for other, against in summaries(rows, main).items()}
            if found:
                yield title(suite, mode), "", ", ".join(f"{' to '.join(ends)} {other}" for other, ends in found.items())
            continue
        ours = rows[rows["provider"] == main]
        faster = ratios_to_each(ours, rows)
        for index, row in ours.iterrows():
            shares = [f"{name.upper()} {units.share(row[name])}" for name in row[["mfu", "mbu"]].dropna().index]
            speed = ", ".join([f"{units.count(row['tokens_per_second'])} tokens/s", *shares])
            text = ", ".join(f"{units.ratio(ratio)} {other}" for other, ratio in faster.loc[index].dropna().items())
            yield f"{title(suite, mode)}, {row['case']}", speed, text
