"""Commands in the documents run, and their tables are what the code says now."""

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
from benchmarks import accuracy
from benchmarks.cost_model import operators
from benchmarks.reporting import generation, learning
from benchmarks.roofline import operator_table, step_table
from benchmarks.roofline.bounds import gpu_named
from benchmarks.vs_nanogpt import compare, learning_curves
from gptfast import GPTConfig
from gptfast.training import recipes as recipes_by_name
from kernels import attention, tuning
from tests.support.documents import run, words

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
TRAINING, GENERATION, RECIPES, OPERATORS, NUMERICS, ADDING, BENCHMARKING, *_ = IN_ORDER = tuple(
    ROOT / "docs" / f"{name}.md"
    for name in (
        "training", "generation", "recipes", "operators", "numerics", "adding-an-operator", "benchmarking",
        "distributed", "drop-in", "evaluation",
    )
)  # fmt: skip


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path: Path) -> list[str]:
    return [line for block in blocks(path, "sh") for line in block.splitlines()]


def between(path: Path, start: str, end: str) -> str:
    return path.read_text(encoding="utf-8").partition(f"{start}\n")[2].partition(end)[0]


COMMANDS = [
    pytest.param(line, id=f"{path.name}-{line}")
    for path in DOCUMENTS
    if path not in IN_ORDER
    for line in commands(path)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str):
    assert run(words(command), ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("path", IN_ORDER, ids=lambda path: path.name)
def test_commands_and_code_one_after_the_other(path, tmp_path):
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


def test_the_tables_of_a_step_are_those_of_its_passes():
    """`python -m benchmarks.roofline.step_table` prints them."""
    written = between(ROOT / "docs/step.md", step_table.START, step_table.END)
    gpu = gpu_named("H200 SXM")
    assert written == step_table.tables(GPTConfig.preset("gpt2", pad_vocab_size_to=128), 32, 1024, gpu)


def test_the_table_of_recipes_is_that_of_the_committed_results():
    written = between(TRAINING, "<!-- recipes:start -->", "<!-- recipes:end -->")
    results = json.loads((ROOT / "benchmarks/results/cpu/recipes.json").read_text(encoding="utf-8"))
    assert written == compare.passage(results)


def test_the_table_of_generation_is_that_of_the_committed_results():
    """`benchmarks.reporting.generation.passage` writes it."""
    written = between(GENERATION, "<!-- generation:start -->", "<!-- generation:end -->")
    assert written == generation.passage(ROOT / "benchmarks/results/cpu")


def test_the_table_of_operators_is_that_of_their_costs():
    """`python -m benchmarks.roofline.operator_table` prints it."""
    table = operator_table.table(gpu_named("H200 SXM"))
    assert between(OPERATORS, operator_table.START, operator_table.END) == table


def test_every_operator_has_its_place_in_the_documents():
    text = OPERATORS.read_text(encoding="utf-8")
    for name in set(kernels.__all__) - {"reference", "warmup"}:
        assert f"`{name}(" in text, name


def test_the_table_of_errors_is_that_of_the_committed_results():
    results = json.loads((ROOT / "benchmarks/results/cpu/accuracy.json").read_text(encoding="utf-8"))
    assert between(NUMERICS, "<!-- accuracy:start -->", "<!-- accuracy:end -->") == accuracy.passage(results)


def test_the_table_of_learning_is_that_of_the_committed_results():
    path = ROOT / "benchmarks/results/cpu/learning-shakespeare-char-cpu-dtype.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    assert between(NUMERICS, "<!-- learning:start -->", "<!-- learning:end -->") == learning_curves.passage(results)
    _, rounding, seed = (
        max(abs(apart) for _, apart in learning.differences(run, results["runs"][0])) for run in results["runs"]
    )
    assert rounding < seed / 6  # as the text says


def test_the_tuning_log_has_the_tiles_that_are_launched():
    text = (ROOT / "docs/tuning-log.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (forward|dk_dv|dq) \| (64|128) \| (\d+)x(\d+) w(\d+) s(\d+) \|", text, re.MULTILINE)
    assert len(rows) == 6
    for name, head_size, *blocks in rows:
        launch = getattr(attention, f"_{name.upper()}")
        with tuning.assume_architecture("sm_90"):
            first, *_ = launch.candidates(torch.device("cpu"), int(head_size), 4096, torch.bfloat16, False, True)
        assert first["DESCRIPTORS"]
        assert [first[size] for size in ("BM", "BN", "num_warps", "num_stages")] == list(map(int, blocks)), name


def test_what_documents_name_is_there():
    """Files by their paths, and modules and functions by their names."""
    for path in [ROOT / "README.md", *DOCUMENTS]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:kernels|gptfast|benchmarks|tests|examples|docs)/[\w/-]+(?:\.\w+)?)`", text):
            # a table of launches is there when a GPU was measured
            assert (ROOT / name).exists() or name == "kernels/launches", f"{path.name}: {name}"
        for name in re.findall(r"\b((?:kernels|gptfast|benchmarks)(?:\.\w+)+)\b(?![/.])", text):
            assert pydoc.locate(name) is not None, f"{path.name}: {name}"


VOCABULARIES = {"shakespeare-char-cpu": 65, "shakespeare-char-gpu": 65, "word-gpt": 31}


@pytest.mark.parametrize("path", [ROOT / "README.md", RECIPES], ids=lambda path: path.name)
def test_parameters_of_recipes_are_those_of_their_models(path):
    """In the tables, of every recipe but the sizes between GPT-2's smallest and largest."""
    rows = {
        name: row for row in path.read_text(encoding="utf-8").splitlines() for name in re.findall(r"#([\w-]+)\)", row)
    }
    for name, recipe in recipes_by_name.RECIPES.items():
        shape = dataclasses.replace(recipe.model, vocab_size=VOCABULARIES.get(name, 50257))
        row = rows[re.sub("-(cpu|gpu|medium|large|xl)$", "", name)]
        assert f"{operators.parameters(shape):,}" in row or name in ("gpt2-medium", "gpt2-large"), name


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", *DOCUMENTS]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
