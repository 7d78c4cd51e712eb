"""docs/adding-an-operator.md adds an operator to a copy of the project in four places, and everything collects it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/adding-an-operator.md"

COLLECTED = """
import torch
from triton.runtime.jit import JITFunction
import kernels
from benchmarks.operators import OPERATORS
from gptfast import GPTConfig
from kernels import codegen, operators, reference
from kernels.workload import Workload

assert "rms_norm" in kernels.__all__ and kernels.rms_norm.__module__ == "kernels.rms"
recorded = {launch.kernel.__name__ for launch in codegen.operator_launches(torch.bfloat16)}
assert {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel"} <= recorded
assert kernels.rms_norm in [case.func for case in operators.module_of("rms_norm").warmup_cases(Workload(
    GPTConfig(n_embd=32, n_head=2), "training", 1, 4, torch.float32, torch.float32, torch.device("cpu")))]
assert OPERATORS["rms_norm"].cases[0].cost("forward").bytes > 0
"""


def patches() -> dict[str, list[tuple[str, str]]]:
    """The fenced blocks of each numbered section, by the file that its heading names."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    files = {match[1]: section for section in sections if (match := re.match(r"\d\. .*: (\S+)\n", section))}
    return {name: re.findall(r"```(python|diff)\n(.*?)```", section, re.DOTALL) for name, section in files.items()}


def apply(language: str, block: str, path: Path) -> None:
    """Append Python code, or apply a diff, whose context must occur once."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if language == "python":
        path.write_text(f"{text}\n\n{block}" if text else block, encoding="utf-8")
        return
    lines = block.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line.startswith(" "))
    assert text.count(before) == 1, f"{path}: {before}"
    path.write_text(text.replace(before, "".join(line[1:] for line in lines)), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with the page's operator."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("kernels", "gptfast", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, blocks in patches().items():
        for language, block in blocks:
            apply(language, block, folder / name)
    return folder


def run(project: Path, interpret: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(project), "TRITON_INTERPRET": interpret}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_operator_takes_at_most_four_places():
    assert 0 < len(patches()) <= 4


def test_compiler_warmup_and_benchmarks_collect_the_new_operator(project):
    run(project, "0", "-c", COLLECTED)


@pytest.mark.slow
def test_new_operator_passes_its_generated_tests(project):
    command = "-m pytest -q -p no:cacheprovider tests/test_architecture.py tests/kernels/test_operators.py"
    run(project, "1", *command.split(), "-k", "rms_norm or table or import")
