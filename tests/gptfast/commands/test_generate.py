"""`gptfast generate`: sources of prompts, sampling, beam search, drafts, dtypes and errors."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from gptfast import cli, load_model
from gptfast.commands import generate
from gptfast.generation import text as texts
from gptfast.generation.beam_search import BeamSearch
from gptfast.quantization import Int8Linear, PackedLinear
from gptfast.training import trainer
from tests.support.command_line import error, output
from tests.support.tiny_runs import tiny_run

COMPILE = torch.compile
GREEDY = ("--prompt", "To", "--temperature", "0", "--dtype", "float32")


def generated(capsys, *arguments: str) -> str:
    return output(capsys, "generate", "--max-new-tokens", "12", *arguments, "--device", "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "Zürich"], "'Zcü'"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt-file", "none.txt"], r"none\.txt"),
        (["--temperature", "-1"], r"temperature .*got -1\.0"),
        (["--top-k", "0"], "top_k .*got 0"),
        (["--top-p", "1.5"], r"top_p .*got 1\.5"),
        (["--max-new-tokens", "-5"], "max_new_tokens .*got -5"),
        (["--num-samples", "0"], "num_samples .*got 0"),
        (["--seed", "-1"], "seed .*got -1"),
        (["--seed", "18446744073709551616"], "seed .*got 18446744073709551616"),
        (["--device", "tpu"], "'tpu'.*auto, "),
        (["--backend", "cuda"], "backend 'cuda'.*auto, triton, "),
        (["--dtype", "int4"], "'int4' .*'--dtype'"),
        (["--json", "--stream"], "--json .*--stream"),
        (["--interactive", "--json"], "--interactive .*--json"),
        (["--num-beams", "0"], "num_beams .*got 0"),
        (["--num-beams", "2", "--stream", "--stop", "x"], "--num-beams .*--stream, --stop"),
        (["--num-beams", "2", "--num-samples", "3"], "num_samples .*num_beams=2, got 3"),
        (["--num-beams", "2", "--top-k", "3"], "num_beams=2 .*top_k"),
        (["--draft", "x", "--compile"], "--draft .*--compile"),
        (["--draft-tokens", "0", "--draft", "RUN"], "tokens .*got 0"),
    ],
)
def test_generate_rejects_bad_options(trained, here, capsys, options, message):
    options = [trained if option == "RUN" else option for option in options]
    assert re.search(message, error(capsys, "generate", trained, *options))


def test_generate_needs_a_model(here, capsys):
    assert error(capsys, "generate").startswith("Missing from gptfast generate: MODEL")
    assert error(capsys, "generate", ".").endswith("is not a run folder with weights: it has no config.json")


def test_generate_streams_the_same_text(trained, capsys):
    options = [trained, "--prompt", "To"]
    assert generated(capsys, *options, "--stream") == generated(capsys, *options)


def test_generate_reads_prompts_from_a_file_and_standard_input(trained, here, capsys, monkeypatch):
    Path("prompts.txt").write_text("To\nbe or\n")
    options = [trained, "--temperature", "0", "--json", "--prompt-file"]
    lines = generated(capsys, *options, "prompts.txt").splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["prompt"] for entry in entries] == ["To", "be or"]
    assert all(len(entry["tokens"]) == len(entry["log_probs"]) == len(entry["text"]) == 12 for entry in entries)
    monkeypatch.setattr("sys.stdin", io.StringIO("To\nbe or\n"))
    assert generated(capsys, *options, "-").splitlines() == lines


def test_generate_asks_for_prompts(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    typed = iter(["To", "", "be"])

    def answer(question: str) -> str:
        assert question == "> "
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    written = generated(capsys, trained, "--interactive")
    assert written.startswith("To")
    assert "\nbe" in written
    assert (tmp_path / "cache/gptfast/prompts").is_file()


def test_generate_ends_before_a_stop_string(trained, capsys):
    free = generated(capsys, trained, "--prompt", "To")
    stop = free[10]
    assert generated(capsys, trained, "--prompt", "To", "--stop", stop) == free[: free.index(stop, 2)] + "\n"


def test_beams_equal_the_library(trained, capsys):
    model, tokenizer = load_model.load_run(Path(trained))
    expected = texts.search(model, tokenizer, ["To be"], 12, BeamSearch(3, 0.5, num_return_sequences=2))
    options = ["--num-beams", "3", "--length-penalty", "0.5", "--num-samples", "2", "--dtype", "float32"]
    arguments = [trained, "--prompt", "To be", *options]
    found = [json.loads(line) for line in generated(capsys, *arguments, "--json").splitlines()]
    assert [text["text"] for text in found] == [text.text for text in expected]
    assert [text["score"] for text in found] == pytest.approx([text.score for text in expected], abs=1e-4)
    assert generated(capsys, *arguments) == "".join(f"To be{text.text}\n" for text in expected)


def test_a_draft_changes_no_greedy_text(trained, capsys, monkeypatch):
    alone = generated(capsys, trained, *GREEDY)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    options = [*GREEDY, "--draft", trained, "--draft-tokens", "3", "--device", "cpu", "--max-new-tokens", "12"]
    cli.main(["generate", trained, *options])
    out, err = capsys.readouterr()
    assert out == alone
    assert re.fullmatch(r"12 tokens, [\d,]+ tokens/s, the first text after .* s, 100% of the draft's tokens .*\n", err)


def test_a_draft_with_another_tokenizer_is_rejected(trained, tmp_path, capsys):
    config = tiny_run(tmp_path)
    Path(config.data).write_text("Other letters make another tokenizer. " * 50)
    trainer.train(config)
    message = error(capsys, "generate", trained, "--draft", config.out, "--device", "cpu")
    assert f"--draft {config.out} has another tokenizer than {trained}" in message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_load_in_every_dtype(trained, monkeypatch, dtype):
    monkeypatch.setattr("gptfast.quantization._MIN_BYTES", 0)
    model, _ = generate.load(generate.GenerateConfig(trained, dtype=dtype), trained, torch.device("cpu"))
    kinds = set(map(type, model.modules()))
    assert ({PackedLinear, Int8Linear} & kinds) == {Int8Linear if dtype == "int8" else PackedLinear}
    if dtype != "int8":
        assert str(next(model.parameters()).dtype) == f"torch.{dtype}"


def test_compile_changes_no_greedy_text(trained, capsys, monkeypatch):
    """As traced, without generated code."""
    alone = generated(capsys, trained, *GREEDY)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(1) or COMPILE(f, backend="eager", **how))
    assert generated(capsys, trained, *GREEDY, "--compile") == alone
    assert compiled == [1]
