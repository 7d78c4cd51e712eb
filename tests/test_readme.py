"""Tests of the README's code and commands, run verbatim."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.documents import run, words

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


OUTPUTS = ["the quick brown fox jumps over the lazy", "loss 4.", "{'layer_norm': "]


def command(start: str) -> list[str]:
    (found,) = [line for line in COMMANDS if line.startswith(start)]
    return words(found)


@pytest.mark.parametrize(("code", "output"), [*zip(PYTHON, OUTPUTS, strict=True)], ids=["train", "step", "switch"])
def test_code_runs(tmp_path, code, output):
    assert run([sys.executable, "-c", code], tmp_path).startswith(output)


def test_no_command_is_left_out():
    assert len(COMMANDS) == 6


def test_benchmark_commands_run():
    assert "tokens/s" in run(command("python -m benchmarks.roofline"), ROOT)
    assert " passed" in run(command("pytest benchmarks"), ROOT)


@pytest.mark.slow
def test_training_and_generation_commands_run(tmp_path):
    """Trains for a minute, then generates."""
    assert "validation loss" in run(command("gptfast train shakespeare-char --data stdlib"), tmp_path)
    written = run(command("gptfast generate"), tmp_path)
    assert written.startswith("def ")
    assert len(written) == len("def ") + 500 + len("\n")


def test_prepare_and_train_commands_run(tmp_path):
    assert "vocabulary 257, uint16, in data/stdlib" in run(command("gptfast prepare"), tmp_path)
    assert "validation loss" in run(command("gptfast train shakespeare-char --data data/stdlib"), tmp_path)
