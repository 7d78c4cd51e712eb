"""Commands in the documents run, and their tables are what the code says now."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks import recipes, step_table
from benchmarks.reporting import generation
from documents import run, words
from gptfast import GPTConfig, costs, peaks
from gptfast.training import recipes as recipes_by_name

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
IN_ORDER = tuple(
    ROOT / "docs" / name for name in ("training.md", "generation.md", "drop-in.md", "evaluation.md", "recipes.md")
)
TRAINING, GENERATION, _, _, RECIPES = IN_ORDER


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands(path: Path) -> list[str]:
    return [line for block in blocks(path, "sh") for line in block.splitlines()]


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
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for questions in blocks(path, "jsonl"):
        (tmp_path / "questions.jsonl").write_text(questions, encoding="utf-8")
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        if language == "python":
            run([sys.executable, "-c", block], tmp_path)
        else:
            for command in block.splitlines():
                assert run(words(command), tmp_path), command


def test_the_tables_of_a_step_are_those_of_its_passes():
    """`python -m benchmarks.step_table` prints them."""
    text = (ROOT / "docs" / "step.md").read_text(encoding="utf-8")
    written = text.partition(f"{step_table.START}\n")[2].partition(step_table.END)[0]
    (gpu,) = [gpu for gpu in peaks.GPUS if gpu.name == "H200 SXM"]
    assert written == step_table.tables(GPTConfig.preset("gpt2", pad_vocab_size_to=128), 32, 1024, gpu)


def test_the_table_of_recipes_is_that_of_the_committed_results():
    text = TRAINING.read_text(encoding="utf-8")
    written = text.partition("<!-- recipes:start -->\n")[2].partition("<!-- recipes:end -->")[0]
    results = json.loads((ROOT / "benchmarks/results/cpu/recipes.json").read_text(encoding="utf-8"))
    assert written == recipes.passage(results)


def test_the_table_of_generation_is_that_of_the_committed_results():
    """`benchmarks.reporting.generation.passage` writes it."""
    text = GENERATION.read_text(encoding="utf-8")
    written = text.partition("<!-- generation:start -->\n")[2].partition("<!-- generation:end -->")[0]
    assert written == generation.passage(ROOT / "benchmarks/results/cpu")


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
        assert f"{costs.parameters(shape):,}" in row or name in ("gpt2-medium", "gpt2-large"), name


def test_links_between_documents_lead_somewhere():
    for path in [ROOT / "README.md", *DOCUMENTS]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
