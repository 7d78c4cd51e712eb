"""`gptfast generate` by beam search, with a draft, compiled and in all dtypes."""

from __future__ import annotations

import json
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
from tests.support.tiny_runs import tiny_run

COMPILE = torch.compile


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    config = tiny_run(tmp_path_factory.mktemp("writing"))
    trainer.train(config)
    return config.out


def written(capsys, *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["generate", *arguments, "--device", "cpu", "--max-new-tokens", "12"])
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_beams_equal_the_library(trained, capsys):
    model, tokenizer = load_model.load_run(Path(trained))
    expected = texts.search(model, tokenizer, ["To be"], 12, BeamSearch(3, 0.5, num_return_sequences=2))
    options = ["--num-beams", "3", "--length-penalty", "0.5", "--num-samples", "2", "--dtype", "float32"]
    found = [
        json.loads(line) for line in written(capsys, trained, "--prompt", "To be", "--json", *options).splitlines()
    ]
    assert [text["text"] for text in found] == [text.text for text in expected]
    assert [text["score"] for text in found] == pytest.approx([text.score for text in expected], abs=1e-4)
    plain = written(capsys, trained, "--prompt", "To be", *options)
    assert plain == "".join(f"To be{text.text}\n" for text in expected)


def test_a_draft_changes_no_greedy_text(trained, capsys, monkeypatch):
    options = [trained, "--prompt", "To", "--temperature", "0", "--dtype", "float32"]
    alone = written(capsys, *options)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert written(capsys, *options, "--draft", trained, "--draft-tokens", "3") == alone
    cli.main(["generate", *options, "--draft", trained, "--device", "cpu", "--max-new-tokens", "9"])
    assert "9 tokens" in (said := capsys.readouterr().err)
    assert "tokens/s, the first text after" in said
    assert "100% of the draft's tokens accepted" in said


def test_a_draft_with_another_tokenizer_is_refused(trained, tmp_path, capsys):
    config = tiny_run(tmp_path)
    Path(config.data).write_text("Other letters make another tokenizer. " * 50)
    trainer.train(config)
    error = refused(capsys, trained, "--draft", config.out, "--device", "cpu")
    assert f"--draft {config.out} has another tokenizer than {trained}; accepted: the same" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-beams", "0"], "num_beams must be at least 1, got 0"),
        (
            ["--num-beams", "2", "--stream", "--stop", "x"],
            "--num-beams searches for whole continuations; it excludes --stream, --stop",
        ),
        (["--num-beams", "2", "--num-samples", "3"], "num_samples must be at most num_beams=2, got 3"),
        (["--num-beams", "2", "--top-k", "3"], "num_beams=2 searches and draws nothing; it excludes top_k"),
        (["--draft", "x", "--compile"], "--draft reads several tokens at a time; it excludes --compile"),
        (["--dtype", "int4"], "unknown dtype 'int4'; accepted: auto, float32, bfloat16, float16, int8"),
        (["--draft-tokens", "0", "--draft", "RUN"], "tokens must be"),
    ],
)
def test_options_that_exclude_each_other_are_refused(trained, capsys, options, message):
    options = [trained if option == "RUN" else option for option in options]
    assert message in refused(capsys, trained, "--device", "cpu", *options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_load_in_every_dtype(trained, capsys, dtype, monkeypatch):
    kinds = set()
    loaded = generate.load
    monkeypatch.setattr(
        generate,
        "load",
        lambda *arguments: (kinds.update(map(type, (found := loaded(*arguments))[0].modules())), found)[1],
    )
    monkeypatch.setattr("gptfast.quantization._MIN_BYTES", 0)
    assert written(capsys, trained, "--prompt", "To be", "--dtype", dtype).startswith("To be")
    assert ({PackedLinear, Int8Linear} & kinds) == {Int8Linear if dtype == "int8" else PackedLinear}


def test_compile_changes_no_greedy_text(trained, capsys, monkeypatch):
    """As traced, without generated code."""
    options = [trained, "--prompt", "To", "--temperature", "0", "--dtype", "float32"]
    alone = written(capsys, *options)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append(1) or COMPILE(f, backend="eager", **how))
    assert written(capsys, *options, "--compile") == alone
    assert compiled == [1]
