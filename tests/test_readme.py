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


def command(start: str) -> list[str]:
    """The one that begins like this."""
    (found,) = [line for line in COMMANDS if line.startswith(start)]
    return words(found)


def test_training_script_runs(tmp_path):
    written = run([sys.executable, "-c", PYTHON[0]], tmp_path)
    assert written.startswith("the quick brown fox jumps over the lazy")


def test_step_runs(tmp_path):
    assert run([sys.executable, "-c", PYTHON[1]], tmp_path).startswith("loss 4.")


def test_backend_switch_runs(tmp_path):
    assert run([sys.executable, "-c", PYTHON[2]], tmp_path).startswith("{'layer_norm': ")


def test_no_example_is_left_out():
    assert (len(PYTHON), len(COMMANDS)) == (3, 6)


def test_roofline_command_runs():
    assert "tokens/s" in run(command("python -m benchmarks.roofline"), ROOT)


def test_benchmark_command_runs():
    assert " passed" in run(command("pytest benchmarks"), ROOT)


@pytest.mark.slow
def test_training_and_generation_commands_run(tmp_path):
    """Trains for a minute and generates, word for word."""
    assert "validation loss" in run(command("gptfast train shakespeare-char --data stdlib"), tmp_path)
    written = run(command("gptfast generate"), tmp_path)
    assert written.startswith("def ")
    assert len(written) == len("def ") + 500 + len("\n")


def test_prepare_and_train_commands_run(tmp_path):
    assert "vocabulary 257, uint16, in data/stdlib" in run(command("gptfast prepare"), tmp_path)
    assert "validation loss" in run(command("gptfast train shakespeare-char --data data/stdlib"), tmp_path)
