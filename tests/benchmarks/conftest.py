import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.vs_nanogpt.runs import FILES
from tests.support.nanogpt import TEXT, TRAIN

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def fixtures(tmp_path) -> Path:
    """A copy of the stored results, to write into."""
    for folder in FIXTURES.glob("fixture-*"):
        shutil.copytree(folder, tmp_path / "results" / folder.name)
    return tmp_path / "results"


@pytest.fixture
def rewrite() -> Callable[..., Path]:
    """Change a results file by a function of its JSON, and write it to the same or another path."""

    def change(source: Path, edit: Callable[[dict], object], target: Path | None = None) -> Path:
        data = json.loads(source.read_text(encoding="utf-8"))
        edit(data)
        target = source if target is None else target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(data), encoding="utf-8")
        return target

    return change


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What stands for nanoGPT."""
    folder = tmp_path / "checkout"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(TRAIN if name == "train.py" else "")
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path
