"""Write the generated tables of README.md and docs/: `python -m benchmarks.documents`.

Each table is between two markers, `<!-- name:start -->` and `<!-- name:end -->`. Tables of measurements come from
benchmarks/results, the others from the cost model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import accuracy
from benchmarks.report import readme_figures
from benchmarks.reporting import results, tables, units
from benchmarks.reporting.markdown import escape, grid, replace_passage, write_text
from benchmarks.roofline import gpu_named, operator_table, step_table
from benchmarks.vs_nanogpt import compare, learning_curves
from gptfast import GPTConfig

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
LEARNING = "learning-shakespeare-char-cpu-dtype"
GPU = "H200 SXM"  # of the cost model's tables


def _committed(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / "cpu" / f"{name}.json").read_text(encoding="utf-8"))


def _step_tables() -> str:
    config = GPTConfig.preset("gpt2", pad_vocab_size_to=128)
    return step_table.tables(config, 32, 1024, gpu_named(GPU))


def generation_table() -> str:
    """Format the speed of every provider, and its ratios to the others."""
    run = results.load(RESULTS / "cpu")
    rows = run.rows[run.rows["suite"] == "generation"]
    faster = tables.ratios_to_each(rows, rows)
    lines = [
        (
            *(str(row["dims"][name]) for name in ("model", "B", "T", "new")),
            "int8" if row["provider"].endswith("int8") else row["dtype"],
            *(row["provider"], units.count(row["tokens_per_second"]), units.seconds(row["seconds_to_first_token"])),
            *map(units.ratio, faster.loc[index]),
        )
        for index, row in rows.iterrows()
    ]
    sizes = ("model", "batch", "prompt", "new", "dtype")
    columns = (*sizes, "provider", "tokens/s", "first token", *(f"times {other}" for other in faster.columns))
    return f"{grid(columns, lines)}\n\n{escape(run.machine.device)}: {tables.origin(run)}.\n"


# text of each table by document and name of the markers
PASSAGES: dict[tuple[str, str], Callable[[], str]] = {
    ("README.md", "figures"): lambda: readme_figures(RESULTS),
    ("docs/generation.md", "generation"): generation_table,
    ("docs/training.md", "recipes"): lambda: compare.passage(_committed("recipes")),
    ("docs/numerics.md", "accuracy"): lambda: accuracy.passage(_committed("accuracy")),
    ("docs/numerics.md", "learning"): lambda: learning_curves.passage(_committed(LEARNING)),
    ("docs/operators.md", "operators"): lambda: operator_table.table(gpu_named(GPU)),
    ("docs/step.md", "tables"): _step_tables,
}


def main() -> None:
    """Replace the tables in place."""
    for (document, name), text in PASSAGES.items():
        write_text(ROOT / document, replace_passage(ROOT / document, name, text()))


if __name__ == "__main__":
    main()
