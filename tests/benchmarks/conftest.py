import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.measuring import machine
from benchmarks.vs_nanogpt.compare import FILES
from tests.benchmarks import invented
from tests.support.nanogpt import TEXT, TRAIN


@pytest.fixture(scope="session")
def stored(tmp_path_factory) -> Path:
    """Folder of invented results: fixture-gpu, fixture-unknown and fixture-cpu. Tests only read it."""
    folder = tmp_path_factory.mktemp("results")
    invented.write(folder)
    return folder


@pytest.fixture(scope="session")
def gpu_folder(stored) -> Path:
    return stored / "fixture-gpu"


@pytest.fixture
def fixtures(stored, tmp_path) -> Path:
    """Writable copy of `stored`."""
    return Path(shutil.copytree(stored, tmp_path / "results"))


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
def quick(monkeypatch) -> None:
    """Replace what results say of this machine, whose limits take seconds to measure."""
    known = {
        "device": "made up",
        "slug": "cpu",
        "kind": "cpu",
        "torch": "2",
        "gptfast": "0",
        "python": "3",
        "threads": 2,
    }
    limits = {"copy_bytes_per_second": 1.0, "matrix_flops_per_second": {"float32": 1.0}}
    monkeypatch.setattr(machine, "describe", lambda device: known | {"threads": 2, "peak": {"name": None}})
    monkeypatch.setattr(machine, "measure_limits", lambda device: limits)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Folder that replaces nanoGPT's checkout."""
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
