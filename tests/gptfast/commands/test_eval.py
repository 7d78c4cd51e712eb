"""`gptfast eval`: its output for every kind of data and model, and its errors."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast import cli, load_model
from gptfast.checkpoint.atomic_files import read_tensors, write_tensors
from gptfast.commands.prepare import PrepareConfig, prepare
from gptfast.data.shards import Tokens
from gptfast.evaluation import multiple_choice, perplexity
from gptfast.evaluation.perplexity import Windows
from gptfast.training import trainer
from tests.support.command_line import error
from tests.support.tiny_runs import TEXT, tiny_run

QUESTIONS = [
    {"ctx": "To be, or not to be", "endings": [", that is the question:", "be be be be"], "label": 0},
    {"ctx": "that is", "endings": ["not not", "the question:", "to be"], "label": 1},
]
BOTH = ("--data", "text.txt", "--choices", "choices.jsonl")


@pytest.fixture(autouse=True)
def data(here) -> None:
    """A text and questions in the current folder."""
    Path("text.txt").write_text(TEXT[:300])
    Path("choices.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["eval", *arguments, "--device", "cpu"])
    found = capsys.readouterr()
    assert found.err == ""  # a progress bar needs a terminal
    return found.out


def measured(capsys, *arguments: str) -> dict:
    out = printed(capsys, *arguments, "--json", "--dtype", "float32")
    assert out.count("\n") == 1
    return json.loads(out)


def fails(capsys, *arguments: str, status: int = 2) -> str:
    return error(capsys, "eval", *arguments, status=status)


def test_json_has_the_scores_of_the_library(trained, capsys):
    found = measured(capsys, trained, *BOTH, "--stride", "5")
    model, tokenizer = load_model.load_run(Path(trained))
    windows = Windows(Tokens([tokenizer.encode(TEXT[:300])]), 16, 5)
    score = perplexity.score(model, tokenizer, windows, torch.float32, 4)
    assert found["model"] == trained
    assert (found["device"], found["dtype"], found["weights"]) == ("cpu", "float32", "float32")
    assert found["backend"] == {"layer_norm": "cpu", "ffn": "cpu", "attention": "cpu", "loss": "eager"}
    assert found["data"] == {
        "source": "text.txt",
        "tokens": 299,
        "bytes": 299,
        "windows": len(windows),
        "block_size": 16,
        "stride": 5,
        "loss": pytest.approx(score.loss.value),
        "loss_stderr": pytest.approx(score.loss.stderr),
        "loss_interval": pytest.approx(list(score.loss.interval)),
        "perplexity": pytest.approx(math.exp(score.loss.value)),
        "bits_per_byte": pytest.approx(score.loss.value / math.log(2)),
        "bits_per_byte_stderr": pytest.approx(score.loss.stderr / math.log(2)),
        "bits_per_byte_interval": pytest.approx([bound / math.log(2) for bound in score.loss.interval]),
    }
    answers = multiple_choice.score(model, tokenizer, multiple_choice.read(Path("choices.jsonl")), torch.float32, 4)
    expected = {"file": "choices.jsonl", "questions": 2}
    for name in ("acc", "acc_norm", "acc_bytes"):
        estimate = getattr(answers, name)
        expected |= {name: estimate.value, f"{name}_stderr": estimate.stderr}
        expected[f"{name}_interval"] = pytest.approx(list(estimate.interval))
    assert found["choices"] == expected


def test_table_has_the_numbers_of_the_json(trained, capsys):
    found = measured(capsys, trained, *BOTH)
    rows = dict(line.split("  ", 1) for line in printed(capsys, trained, *BOTH, "--dtype", "float32").splitlines())
    data, choices = found["data"], found["choices"]
    for row, values in {
        "model": (trained, "cpu", "float32", "layer_norm=cpu ffn=cpu attention=cpu loss=eager"),
        "text": ("text.txt", "299 tokens", "299 bytes"),
        "windows": ("19", "16 tokens", "stride 16"),
        "loss": (f"{data['loss']:.4f} ± {data['loss_stderr']:.4f}",),
        "perplexity": (f"{data['perplexity']:.3f}", "95 %", *(f"{math.exp(b):.3f}" for b in data["loss_interval"])),
        "bits per byte": (f"{data['bits_per_byte']:.4f} ± {data['bits_per_byte_stderr']:.4f}",),
        "choices": ("choices.jsonl", "2 questions"),
        **{name: (f"{choices[name]:.4f} ± {choices[f'{name}_stderr']:.4f}",) for name in ("acc", "acc_norm")},
    }.items():
        assert all(value in rows[row] for value in values), rows[row]


def test_data_or_choices_alone(trained, capsys):
    assert "choices" not in measured(capsys, trained, "--data", "text.txt")
    assert "data" not in measured(capsys, trained, "--choices", "choices.jsonl")


def test_limit_leaves_estimates_without_errors(trained, capsys):
    found = measured(capsys, trained, *BOTH, "--limit", "1")
    assert (found["data"]["windows"], found["data"]["tokens"], found["choices"]["questions"]) == (1, 16, 1)
    assert found["data"]["loss_stderr"] is found["data"]["loss_interval"] is found["choices"]["acc_stderr"] is None
    out = printed(capsys, trained, *BOTH, "--limit", "1")
    assert "±" not in out
    assert "95 %" not in out


def test_dtype_and_backend_change_the_loss_a_little(trained, capsys):
    exact = measured(capsys, trained, "--data", "text.txt")["data"]["loss"]
    for options in (["--dtype", "bfloat16"], ["--dtype", "int8"], ["--backend", "loss=triton"]):
        found = json.loads(printed(capsys, trained, "--data", "text.txt", "--json", *options))
        assert found["data"]["loss"] == pytest.approx(exact, rel=0.02)
        assert found["weights"] == ("int8" if "int8" in options else "float32")
        assert found["backend"]["loss"] == ("triton" if "loss=triton" in options else "eager")
        # with a GPU kernels are compiled, and a model on the CPU runs the reference in their place
        assert (found["data"]["loss"] == exact) is (torch.cuda.is_available() and "loss=triton" in options)
    out = printed(capsys, trained, "--data", "text.txt", "--dtype", "int8", "--backend", "ffn=triton")
    assert "int8 weights, backend layer_norm=cpu ffn=triton attention=cpu loss=eager\n" in out


def prepared(source: str, out: str, tokenizer: str = "char") -> None:
    prepare(PrepareConfig(source, out=out, tokenizer=tokenizer, held_out=0.4))


@pytest.mark.parametrize("split", ["val", "train"])
def test_split_of_prepared_data(trained, capsys, split: str):
    Path("whole.txt").write_text(TEXT)
    prepared("whole.txt", "folder")
    cut = int(len(TEXT) * 0.6)
    Path("part.txt").write_text(TEXT[cut:] if split == "val" else TEXT[:cut])
    expected = measured(capsys, trained, "--data", "part.txt")["data"]
    options = [] if split == "val" else ["--split", split]
    assert measured(capsys, trained, "--data", "folder", *options)["data"] == expected | {"source": "folder"}


def test_data_of_nanogpt_has_the_tokens_of_the_model(trained, capsys):
    _, tokenizer = load_model.load_run(Path(trained))
    ids = tokenizer.encode(TEXT[:300]).astype(np.uint16)
    Path("nano").mkdir()
    for name in ("train", "val"):
        ids.tofile(f"nano/{name}.bin")
    expected = measured(capsys, trained, "--data", "text.txt")["data"]
    assert measured(capsys, trained, "--data", "nano")["data"] == expected | {"source": "nano"}
    np.append(ids, np.uint16(999)).tofile("nano/val.bin")
    assert fails(capsys, trained, "--data", "nano").startswith("token id 999 ")


def test_words_have_no_bits_per_byte(here, capsys):
    config = tiny_run(here)
    config.tokenizer = "word"
    trainer.train(config)
    found = measured(capsys, config.out, "--data", "text.txt")["data"]
    assert found["bytes"] is found["bits_per_byte"] is found["bits_per_byte_stderr"] is None
    assert "bits per byte  none" in printed(capsys, config.out, "--data", "text.txt")


def test_model_of_transformers(here, capsys):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained("folder")
    ids = torch.tensor([*TEXT[:257].encode()])
    with torch.no_grad():
        logits = theirs(ids[:-1].view(16, 16)).logits.double()  # [16, 16, V]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]).item()
    found = measured(capsys, "folder", "--data", "text.txt", "--limit", "16", "--tokenizer", "byte")["data"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == 256


GOOD = {"ctx": "To", "endings": ["be", "not"], "label": 0}


@pytest.mark.parametrize(
    ("options", "content", "message"),
    [
        ([], "", "nothing to measure"),
        (["--data", "missing.txt"], "", "'missing.txt'"),
        (["--data", "bad"], "", "bad is empty"),
        (["--data", "bad"], "T", "1 tokens"),
        (["--data", "bad"], "To Zürich", "the characters 'Zcü'"),
        (["--data", "bad"], "Zürich".encode("latin-1"), "bad is not UTF-8"),
        (["--data", "text.txt", "--stride", "0"], "", "stride must be at least 1, got 0"),
        (["--data", "text.txt", "--stride", "17"], "", "stride must be from 1 to block_size=16, got 17"),
        (["--data", "text.txt", "--limit", "0"], "", "limit must be at least 1, got 0"),
        (["--data", "text.txt", "--batch-size", "-1"], "", "batch_size must be at least 1, got -1"),
        (["--data", "text.txt", "--split", "test"], "", "'test' for argument '--split'"),
        (["--data", "text.txt", "--device", "tpu"], "", "'tpu'"),
        (["--data", "text.txt", "--dtype", "int4"], "", "'int4' for argument '--dtype'"),
        (["--data", "text.txt", "--backend", "cuda"], "", "backend 'cuda'"),
        (["--choices", "missing.jsonl"], "", "missing.jsonl"),
        (["--choices", "bad"], json.dumps(GOOD) + "\n{", "bad, line 2: not JSON"),
        (["--choices", "bad"], json.dumps(GOOD | {"ctx": "Zürich"}), "question 1: the tokenizer lacks"),
        (["--choices", "bad"], json.dumps(GOOD | {"ctx": ""}), "question 1: the context is empty"),
    ],
)
def test_bad_input_ends_in_a_line(trained, capsys, options: list[str], content: str | bytes, message: str):
    Path("bad").write_bytes(content.encode() if isinstance(content, str) else content)
    assert message in fails(capsys, trained, *options)


def test_missing_models_and_data_of_another_tokenizer_end_in_a_line(trained, here, capsys):
    prepared("text.txt", "folder", "byte")
    assert fails(capsys, trained, "--data", "folder").startswith("folder was prepared with another tokenizer")
    assert "'gpt5'" in fails(capsys, "gpt5", "--data", "text.txt")
    assert "config.json" in fails(capsys, str(here), "--data", "text.txt")


@pytest.mark.parametrize("source", [BOTH[:2], BOTH[2:]], ids=["data", "choices"])
def test_weights_that_are_not_finite_end_in_a_line(trained, capsys, source: tuple[str, ...]):
    shutil.copytree(trained, "broken")
    weights = read_tensors(Path("broken/model.safetensors"))
    weights["transformer.ln_f.weight"].fill_(math.nan)
    write_tensors(Path("broken/model.safetensors"), weights)
    assert "a loss of nan" in fails(capsys, "broken", *source, "--device", "cpu", "--dtype", "float32", status=1)


def test_progress_bars_on_a_terminal(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["eval", trained, *BOTH, "--device", "cpu"])
    bars = capsys.readouterr().err
    assert all(text in bars for text in ("/19 [", "/5 [", "window", "ending"))
