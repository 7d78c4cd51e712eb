"""The table of docs/generation.md: every provider's speed of generation on one device, beside its peers'."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reporting import ratios, results, units
from benchmarks.reporting.content import commits, versions
from benchmarks.reporting.markdown import escape, grid
from benchmarks.reporting.ratios import Ratio
from benchmarks.reporting.rows import Row
from benchmarks.reporting.tables import date

PEERS = ("Hugging Face", "nanoGPT")


def passage(folder: str | Path) -> str:
    """The generation rows of a device's folder of results, and on what they were measured.

    Raises:
        ResultsError: nothing usable in the folder.
    """
    run = results.load_folder(Path(folder))
    lines = []
    for providers in ratios.cases(row for row in run.rows if row.suite == "generation").values():
        lines += [_line(row, providers) for row in providers.values()]
    head = (
        "model",
        "batch",
        "prompt",
        "new",
        "dtype",
        "provider",
        "tokens/s",
        "first token",
        *(f"times {peer}" for peer in PEERS),
    )
    machine = run.machine
    transformers = machine.peers.get("transformers")
    beside = f", transformers {transformers}" if transformers else ""
    measured = f"{versions(machine)}{beside}; measured {date(run.newest)} UTC at commit {commits(run)}"
    return f"{grid(head, lines)}\n\n{escape(machine.device)}: {measured}.\n"


def _line(row: Row, providers: dict[str, Row]) -> tuple[str, ...]:
    dims = row.dims
    return (
        *(str(dims[name]) for name in ("model", "B", "T", "new")),
        "int8" if row.provider.endswith("int8") else row.dtype,
        row.provider,
        units.count(row.tokens_per_second),
        units.seconds(row.seconds_to_first_token),
        *(
            units.ratio(Ratio(row, providers[peer]).value)
            if peer in providers and peer != row.provider
            else units.NOTHING
            for peer in PEERS
        ),
    )
