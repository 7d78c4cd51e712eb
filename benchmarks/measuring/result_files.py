"""Files of results that pytest-benchmark does not write: what `benchmarks.report` reads of them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.utils import get_commit_info

from benchmarks.measuring import machine
from benchmarks.reporting.results import FORMAT
from gptfast.checkpoint.atomic_files import write_json


def head(device: torch.device) -> dict[str, Any]:
    """When, on what and of which commit; without rows of pytest-benchmark's."""
    return {
        "gptfast_results": FORMAT,
        "datetime": datetime.now(UTC).isoformat(),
        "machine_info": {"gptfast": machine.describe(device) | {"limits": machine.measure_limits(device)}},
        "commit_info": get_commit_info(),
        "benchmarks": [],
        "not_measured": [],
    }


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the results so far: the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
