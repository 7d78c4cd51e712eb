"""Tests of README.md and docs/: commands run, generated tables are current, names and links exist."""

import dataclasses
import json
import pydoc
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks import documents
from benchmarks.cost_model import operators
from benchmarks.reporting.markdown import passage
from benchmarks.vs_nanogpt import learning_curves
from gptfast.training import recipes as recipes_by_name
from kernels import attention, tuning
from tests.support.documents import run, words

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
OPERATORS, RECIPES = ROOT / "docs/operators.md", ROOT / "docs/recipes.md"
IN_ORDER = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in (
        "training", "generation", "recipes", "operators", "numerics", "benchmarking",
        "distributed", "drop-in", "evaluation",
    )
)  # fmt: skip


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path: Path) -> list[str]:
    return [line for block in blocks(path, "sh") for line in block.splitlines()]


@pytest.mark.parametrize("command", [line for path in DOCUMENTS if path not in IN_ORDER for line in commands(path)])
def test_commands_run(command: str):
    assert run(words(command), ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("path", IN_ORDER, ids=lambda path: path.name)
def test_commands_and_code_run_in_order(path, tmp_path):
    for folder in ("examples", "benchmarks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for questions in blocks(path, "jsonl"):
        (tmp_path / "questions.jsonl").write_text(questions, encoding="utf-8")
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        if language == "python":
            (tmp_path / "block.py").write_text(block, encoding="utf-8")  # Triton reads the source of its kernels
            run([sys.executable, "block.py"], tmp_path)
        else:
            for command in block.splitlines():
                assert run(words(command), tmp_path), command


@pytest.mark.parametrize(("document", "name"), documents.PASSAGES)
def test_generated_tables_are_current(document, name):
    """`python -m benchmarks.documents` writes them."""
    assert passage((ROOT / document).read_text(encoding="utf-8"), name) == documents.PASSAGES[document, name]()


def test_rounding_moves_the_loss_less_than_the_seed():
    """docs/numerics.md claims the factor."""
    path = documents.RESULTS / "cpu" / f"{documents.LEARNING}.json"
    first, *others = json.loads(path.read_text(encoding="utf-8"))["runs"]
    rounding, seed = (max(abs(above) for _, above in learning_curves.differences(run, first)) for run in others)
    assert rounding < seed / 6


def test_every_operator_is_documented():
    text = OPERATORS.read_text(encoding="utf-8")
    for name in set(kernels.__all__) - {"reference", "warmup"}:
        assert f"`{name}(" in text, name


def test_tuning_log_has_the_launched_tiles():
    text = (ROOT / "docs/tuning-log.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (forward|dk_dv|dq) \| (64|128) \| (\d+)x(\d+) w(\d+) s(\d+) \|", text, re.MULTILINE)
    assert len(rows) == 6
    for name, head_size, *blocks in rows:
        launch = getattr(attention, f"_{name.upper()}")
        with tuning.assume_architecture("sm_90"):
            first, *_ = launch.candidates(torch.device("cpu"), int(head_size), 4096, torch.bfloat16, False, True)
        assert first["DESCRIPTORS"]
        assert [first[size] for size in ("BM", "BN", "num_warps", "num_stages")] == list(map(int, blocks)), name


def test_documents_name_existing_files_and_code():
    for path in [ROOT / "README.md", *DOCUMENTS]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:kernels|gptfast|benchmarks|tests|examples|docs)/[\w/-]+(?:\.\w+)?)`", text):
            # kernels/launches exists once a GPU was measured
            assert (ROOT / name).exists() or name == "kernels/launches", f"{path.name}: {name}"
        for name in re.findall(r"\b((?:kernels|gptfast|benchmarks)(?:\.\w+)+)\b(?![/.])", text):
            # docs/adding-an-operator.md adds rms_norm to a copy of the project
            assert pydoc.locate(name) is not None or name.endswith(".rms_norm"), f"{path.name}: {name}"


VOCABULARIES = {"shakespeare-char-cpu": 65, "shakespeare-char-gpu": 65, "word-gpt": 31}


@pytest.mark.parametrize("path", [ROOT / "README.md", RECIPES], ids=lambda path: path.name)
def test_recipe_tables_have_the_models_parameters(path):
    """The tables leave out the sizes between GPT-2's smallest and largest."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = {name: row for row in lines for name in re.findall(r"#([\w-]+)\)", row)}
    for name, recipe in recipes_by_name.RECIPES.items():
        shape = dataclasses.replace(recipe.model, vocab_size=VOCABULARIES.get(name, 50257))
        row = rows[re.sub("-(cpu|gpu|medium|large|xl)$", "", name)]
        assert f"{operators.parameters(shape):,}" in row or name in ("gpt2-medium", "gpt2-large"), name


def test_links_have_targets():
    for path in [ROOT / "README.md", *DOCUMENTS]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
