"""What a report says in words: its headline, its leading ratios, and how the figures were taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting import ratios, tables, units
from benchmarks.reporting.rows import BASELINE, MODEL_SUITES, SUITES, Machine, Run, Source
from benchmarks.reporting.tables import Table

RATIO_NOTE = (
    f"Ratios are of median times of the same case: 2.00{units.TIMES} is half the other's time. {units.LOSS} marks what "
    f"is slower than the other. The best peer is the fastest of the others in each case, plain eager aside."
)
MFU_NOTE = (
    "MFU is the share of the matrix peak above that the step's FLOPs make up: by PaLM's convention with the "
    "full score matrix, and causal with only the scores that the mask lets through."
)
_METHOD = [
    "Providers of a case are measured interleaved, in rotating order, in one process, after warming each of them up: "
    "what changes with time strikes all of them alike.",
    "The median is shown, with the 20th and 80th percentile beside it.",
    "Shares of copy and matrix rate are of the limits measured at the beginning of the same run, not of the data "
    "sheet.",
    "A result is checked before it is timed: the error is relative, against the reference in higher precision; of a "
    "training step it is that of the loss and of the norm of its gradient.",
    "Of roofline: the least time that bytes and FLOPs of the operations take at the limits measured, as a share of the "
    "time that they took.",
    "What was measured in different runs is not compared.",
]
_CUDA_METHOD = [
    "Operators: time of the device between two CUDA events. The queue is filled beforehand, so that gaps between "
    "launches do not count, by overwriting a buffer larger than the L2 cache, so that inputs come from memory. The "
    "time the host needs for the call stands beside it.",
    "Training steps and generation: wall clock between two synchronisations of the device.",
]
_CPU_METHOD = ["Wall clock. There are no device events on a CPU, and its caches are as the call before left them."]


@dataclass(frozen=True)
class Lead:
    """A ratio that leads the report: over all cases, from the worst to the best."""

    label: str
    values: list[str]
    detail: str


def headline(run: Run) -> list[tuple[str, str]]:
    """Device, versions, commit, date and limits."""
    machine, source = run.machine, run.newest
    peers = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine.peers.items())
    lines = [
        ("Device", machine.device + (f", driver {machine.driver}" if machine.driver else "")),
        ("Versions", versions(machine)),
        ("Peers", peers),
        ("Commit", commits(run)),
        ("Measured", f"{tables.date(source)} UTC"),
        ("Limits measured", _limits(machine)),
        ("Data sheet" if machine.kind == "cuda" else "Peak", _peak(machine)),
    ]
    return [(name, text) for name, text in lines if text]


def versions(machine: Machine) -> str:
    """Versions of what was measured and what it ran on."""
    known = {"gptfast": machine.gptfast, "PyTorch": machine.torch, "Triton": machine.triton, "CUDA": machine.cuda}
    known["Python"] = machine.python
    return ", ".join(f"{name} {version}" for name, version in known.items() if version) + f", {machine.threads} threads"


def commits(run: Run) -> str:
    """The commits that the rows were measured at, the newest first, and whether they were all there was."""
    used = {row.source.path for row in run.rows}
    sources = [source for source in reversed(run.sources) if source.path in used] or [run.newest]
    return " and ".join(dict.fromkeys(_commit(source) for source in sources))


def _commit(source: Source) -> str:
    return source.commit[:10] + (" with uncommitted changes" if source.dirty else "")


def _limits(machine: Machine) -> str:
    rates = [f"{dtype} matrix product {units.compute(rate)}" for dtype, rate in machine.matrix_flops_per_second.items()]
    return ", ".join([f"copy {units.bandwidth(machine.copy_bytes_per_second)}", *rates])


def _peak(machine: Machine) -> str:
    peak = machine.peak
    if peak.name is None:
        kind = "CPU" if machine.kind == "cpu" else "unknown GPU"
        return f"{kind}: no peak, MFU not given"
    rates = [f"{dtype} {units.compute(rate)}" for dtype, rate in peak.flops.items()]
    memory = [] if peak.bandwidth is None else [f"memory {units.bandwidth(peak.bandwidth)}"]
    source = f"; source: {peak.source}" if peak.source else ""
    return f"{peak.name}: {', '.join(rates + memory)}{source}"


def leads(run: Run) -> list[Lead]:
    """Training step and generation against each named peer and eager, from the worst case to the best."""
    found = []
    ours = ratios.champion(run)
    for suite in MODEL_SUITES:
        grouped = ratios.cases(row for row in run.rows if row.suite == suite)
        for other in [*ratios.model_peers(run, suite), *([BASELINE] if ours != BASELINE else [])]:
            values = [
                ratios.Ratio(providers[ours], providers[other]).value
                for providers in grouped.values()
                if ours in providers and other in providers
            ]
            if values:
                count = f"{len(values)} cases" if len(values) > 1 else "1 case"
                found.append(Lead(f"{SUITES[suite]} vs {other}", span(values), f"{ours}, {count}"))
    return found


def span(values: list[float]) -> list[str]:
    """The worst and the best of ratios, or the one that there is."""
    return list(dict.fromkeys((units.ratio(min(values)), units.ratio(max(values)))))


def method(run: Run) -> list[str]:
    """How the figures were taken."""
    return (_CPU_METHOD if run.machine.kind == "cpu" else _CUDA_METHOD) + _METHOD


def warnings(run: Run, folder: Path) -> list[str]:
    """What a reader must know before trusting the figures."""
    lines = [f"Not read: {problem.replace(f'{folder}/', '')}" for problem in run.problems]
    dirty = sorted({Path(row.source.path).name for row in run.rows if row.source.dirty})
    if dirty:
        lines.append(f"Measured with uncommitted changes: {', '.join(dirty)}.")
    if ratios.champion(run) != "triton":
        lines.append("Triton was not measured on this device: gptfast stands here with its eager backend.")
    return lines


@dataclass(frozen=True)
class Content:
    """All tables and texts of a report, in the order in which they are shown."""

    headline: list[tuple[str, str]]
    mfu_note: str | None
    warnings: list[str]
    leads: list[Lead]
    summary: list[Table]
    models: list[Table]
    kernels: dict[str, list[Table]]
    not_measured: list[tuple[int, str, str]]
    method: list[str]
    sources: Table


def content(run: Run, folder: Path) -> Content:
    """Gather what a report says of a run whose files lie in `folder`."""
    operators = tables.operator_summary(run)
    return Content(
        headline=headline(run),
        mfu_note=MFU_NOTE if any(row.mfu is not None for row in run.rows) else None,
        warnings=warnings(run, folder),
        leads=leads(run),
        summary=tables.model_summary(run) + ([operators] if operators else []),
        models=tables.model_tables(run),
        kernels={suite: tables.kernel_tables(run, suite) for suite in tables.suites(run.rows)},
        not_measured=tables.not_measured(run),
        method=method(run),
        sources=tables.sources(run),
    )
