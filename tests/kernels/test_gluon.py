"""What `docs/hopper-attention.md` says of a kernel that is compiled and was never run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COLUMNS = ("head_size", "keys", "stages", "registers", "spilled_bytes", "shared_bytes", "wgmma", "bulk_copies")


@pytest.mark.slow
def test_the_table_of_the_document_is_what_the_compiler_says():
    command = [sys.executable, ROOT / "tests/support/warp_specialised.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    text = (ROOT / "docs/hopper-attention.md").read_text(encoding="utf-8")
    rows = [
        [int(cell.replace(",", "")) for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if re.match(r"\| \d", line)
    ]
    assert rows == [[row[name] for name in COLUMNS] for row in compiled]
    # both groups that multiply, and more registers for them than the one that copies
    assert all(row["register_budgets"] >= 2 for row in compiled)
