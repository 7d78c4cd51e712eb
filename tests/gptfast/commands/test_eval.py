"""`gptfast eval`: what it prints, of every kind of data, and what it says of bad input."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gptfast import cli, load_model
from gptfast.checkpoint.atomic_files import read_tensors, write_tensors
from gptfast.commands import eval as command
from gptfast.commands.prepare import PrepareConfig, prepare
from gptfast.data import corpus
from gptfast.data.shards import Tokens
from gptfast.evaluation import multiple_choice, perplexity
from gptfast.evaluation.perplexity import Windows
from gptfast.tokenizers import ByteTokenizer
from gptfast.training import trainer
from tests.support.tiny_runs import TEXT, tiny_run

QUESTIONS = [
    {"ctx": "To be, or not to be", "endings": [", that is the question:", "be be be be"], "label": 0},
    {"ctx": "that is", "endings": ["not not", "the question:", "to be"], "label": 1},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    config = tiny_run(tmp_path_factory.mktemp("eval"))
    trainer.train(config)
    return config.out


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a text and questions."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT[:300])
    Path("choices.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return tmp_path


def printed(capsys, *arguments: str) -> str:
    capsys.readouterr()
    cli.main(["eval", *arguments, "--device", "cpu"])
    found = capsys.readouterr()
    assert found.err == ""  # no bar where there is no terminal
    return found.out


def measured(capsys, *arguments: str) -> dict:
    out = printed(capsys, *arguments, "--json", "--dtype", "float32")
    assert out.count("\n") == 1
    return json.loads(out)


def fails(capsys, *arguments: str, status: int = 2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", *arguments])
    found = capsys.readouterr()
    assert (ended.value.code, found.out, found.err.count("\n")) == (status, "", 1), found
    return found.err.removeprefix("gptfast: ").rstrip()


def test_what_programs_read(trained, here, capsys):
    found = measured(capsys, trained, "--data", "text.txt", "--choices", "choices.jsonl", "--stride", "5")
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
    chosen = multiple_choice.score(model, tokenizer, multiple_choice.read(Path("choices.jsonl")), torch.float32, 4)
    for name in ("acc", "acc_norm", "acc_bytes"):
        estimate = getattr(chosen, name)
        assert found["choices"][name] == estimate.value
        assert found["choices"][f"{name}_stderr"] == estimate.stderr
    assert (found["choices"]["file"], found["choices"]["questions"]) == ("choices.jsonl", 2)


def test_what_people_read(trained, here, capsys):
    arguments = [trained, "--data", "text.txt", "--choices", "choices.jsonl"]
    found = measured(capsys, *arguments)
    lines = dict(line.split("  ", 1) for line in printed(capsys, *arguments, "--dtype", "float32").splitlines())
    lines = {name: value.strip() for name, value in lines.items()}
    data = found["data"]
    low, high = map(math.exp, data["loss_interval"])
    assert lines == {
        "model": f"{trained}: on cpu in float32, layer_norm=cpu ffn=cpu attention=cpu loss=eager",
        "text": "text.txt: 299 tokens, 299 bytes",
        "windows": "19 of 16 tokens, 16 from one to the next",
        "loss": f"{data['loss']:.4f} ± {data['loss_stderr']:.4f} nats per token",
        "perplexity": f"{data['perplexity']:.3f}, with a confidence of 95 % in {low:.3f} to {high:.3f}",
        "bits per byte": f"{data['bits_per_byte']:.4f} ± {data['bits_per_byte_stderr']:.4f}",
        "choices": "choices.jsonl: 2 questions",
        **{
            name: f"{found['choices'][name]:.4f} ± {found['choices'][f'{name}_stderr']:.4f}"
            for name in ("acc", "acc_norm", "acc_bytes")
        },
    }


def test_one_of_both(trained, here, capsys):
    assert "choices" not in measured(capsys, trained, "--data", "text.txt")
    assert "data" not in measured(capsys, trained, "--choices", "choices.jsonl")


def test_no_more_than_asked_for(trained, here, capsys):
    found = measured(capsys, trained, "--data", "text.txt", "--choices", "choices.jsonl", "--limit", "1")
    assert (found["data"]["windows"], found["data"]["tokens"], found["choices"]["questions"]) == (1, 16, 1)
    assert found["data"]["loss_stderr"] is found["data"]["loss_interval"] is found["choices"]["acc_stderr"] is None
    lines = printed(capsys, trained, "--data", "text.txt", "--limit", "1").splitlines()
    assert not any("±" in line or "95 %" in line for line in lines)


def test_the_dtype_and_the_backend(trained, here, capsys):
    exact = measured(capsys, trained, "--data", "text.txt")["data"]["loss"]
    for options in (["--dtype", "bfloat16"], ["--dtype", "int8"], ["--backend", "loss=triton"]):
        found = json.loads(printed(capsys, trained, "--data", "text.txt", "--json", *options))
        assert found["data"]["loss"] == pytest.approx(exact, rel=0.02)
        assert found["weights"] == ("int8" if "int8" in options else "float32")
        assert found["backend"]["loss"] == ("triton" if "loss=triton" in options else "eager")
        # where kernels are compiled, those of a model on the CPU are the reference
        assert (found["data"]["loss"] == exact) is (torch.cuda.is_available() and "loss=triton" in options)
    out = printed(capsys, trained, "--data", "text.txt", "--dtype", "int8", "--backend", "ffn=triton")
    assert ", weights of 8 bits, layer_norm=cpu ffn=triton attention=cpu loss=eager\n" in out


def prepared(source: str, out: str, tokenizer: str = "char") -> None:
    prepare(PrepareConfig(source, out=out, tokenizer=tokenizer, held_out=0.4))


def test_prepared_data(trained, here, capsys):
    Path("whole.txt").write_text(TEXT)
    prepared("whole.txt", "folder")
    cut = int(len(TEXT) * 0.6)
    for split, part in (("val", TEXT[cut:]), ("train", TEXT[:cut])):
        Path("part.txt").write_text(part)
        expected = measured(capsys, trained, "--data", "part.txt")["data"]
        options = [] if split == "val" else ["--split", split]
        found = measured(capsys, trained, "--data", "folder", *options)["data"]
        assert found == expected | {"source": "folder"}


def test_data_prepared_with_another_tokenizer(trained, here, capsys):
    prepared("text.txt", "folder", "byte")
    message = "folder was prepared with another tokenizer than the model's; prepare the text with it"
    assert fails(capsys, trained, "--data", "folder") == message


def test_nanogpts_data(trained, here, capsys):
    """It has no tokenizer: the ids are taken for the model's own."""
    _, tokenizer = load_model.load_run(Path(trained))
    ids = tokenizer.encode(TEXT[:300]).astype(np.uint16)
    Path("nano").mkdir()
    for name in ("train", "val"):
        ids.tofile(f"nano/{name}.bin")
    expected = measured(capsys, trained, "--data", "text.txt")["data"]
    assert measured(capsys, trained, "--data", "nano")["data"] == expected | {"source": "nano"}
    np.append(ids, np.uint16(999)).tofile("nano/val.bin")
    assert fails(capsys, trained, "--data", "nano") == "token id 999 is out of range; accepted: 0 to 16"


def test_line_ends_are_bytes_like_others(here, capsys):
    """In a file as in what is prepared of it."""
    config = tiny_run(here)
    config.tokenizer = "byte"
    trainer.train(config)
    Path("lines.txt").write_bytes(b"to be\r\nor\rnot\n")
    prepared("lines.txt", "folder", "byte")
    ids = [np.fromfile(path, np.uint16) for path in sorted(Path("folder").glob("*.bin"))]
    assert [number for number in sorted(np.concatenate(ids).tolist()) if number < 256] == sorted(b"to be\r\nor\rnot\n")
    found = measured(capsys, config.out, "--data", "lines.txt")["data"]
    assert found["tokens"] == found["bytes"] == len(b"to be\r\nor\rnot\n") - 1


def test_sources_with_names(trained, here, capsys, monkeypatch):
    monkeypatch.setattr(corpus, "standard_library", lambda: TEXT[:100])
    monkeypatch.setattr(corpus, "shakespeare", lambda: TEXT[:200])
    assert measured(capsys, trained, "--data", "stdlib")["data"]["tokens"] == 99
    assert measured(capsys, trained, "--data", "shakespeare")["data"]["tokens"] == 199


def test_words_have_no_bits_per_byte(here, capsys):
    config = tiny_run(here)
    config.tokenizer = "word"
    trainer.train(config)
    found = measured(capsys, config.out, "--data", "text.txt")["data"]
    assert found["bytes"] is found["bits_per_byte"] is found["bits_per_byte_stderr"] is None
    out = printed(capsys, config.out, "--data", "text.txt")
    assert "bits per byte  none: the tokens do not keep the text" in out


def test_a_model_in_hugging_faces_layout(here, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 257, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained("folder")
    monkeypatch.setattr("gptfast.tokenizers.for_documents", lambda name, *rest, **options: ByteTokenizer())
    ids = torch.tensor([*TEXT[:257].encode()])
    with torch.no_grad():
        rows = ids[:-1].view(16, 16)
        logits = theirs(rows).logits.double()  # [16, 16, V]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:]).item()
    found = measured(capsys, "folder", "--data", "text.txt", "--limit", "16")["data"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to measure; give a text with --data or questions with --choices"),
        (["--data", "missing.txt"], "no such data: 'missing.txt'; accepted: stdlib, shakespeare, "),
        (["--data", "empty.txt"], "empty.txt is empty; a file or folder with text is needed"),
        (["--data", "short.txt"], "the text has 1 tokens, at least 2 are needed: one to predict, and one before it"),
        (["--data", "other.txt"], "the tokenizer lacks the characters 'Zcü'; accepted: the 17 of its training text"),
        (["--data", "latin.txt"], "latin.txt is not UTF-8 text: "),
        (["--data", "text.txt", "--stride", "0"], "stride must be at least 1, got 0"),
        (["--data", "text.txt", "--stride", "17"], "stride must be from 1 to block_size=16, got 17"),
        (["--data", "text.txt", "--limit", "0"], "limit must be at least 1, got 0"),
        (["--data", "text.txt", "--batch-size", "-1"], "batch_size must be at least 1, got -1"),
        (["--data", "text.txt", "--split", "test"], "invalid choice 'test' for argument '--split'"),
        (["--data", "text.txt", "--device", "tpu"], "no device 'tpu' here; accepted: auto, "),
        (["--data", "text.txt", "--dtype", "int4"], "unknown dtype 'int4'; accepted: auto, float32, bfloat16, float"),
        (["--data", "text.txt", "--backend", "cuda"], "unknown backend 'cuda'; accepted: auto, triton, cpu, eager"),
        (["--choices", "missing.jsonl"], "no such file with choices: missing.jsonl"),
        (["--choices", "empty.txt"], "empty.txt has no questions; a line of JSON for each is needed"),
        (["--choices", "damaged.jsonl"], "damaged.jsonl, line 2: not JSON: "),
        (["--choices", "label.jsonl"], "label.jsonl, line 1: 'label' must be a number from 0 to 1, got 2"),
        (["--choices", "endings.jsonl"], "endings.jsonl, line 1: 'endings' must be at least two texts that are not"),
        (["--choices", "other.jsonl"], "question 1: the tokenizer lacks the characters 'Zcü'; accepted: the 17"),
        (["--choices", "nothing.jsonl"], "question 1: the context is empty, and the tokenizer has no end of text"),
    ],
)
def test_bad_input(trained, here, capsys, options, message):
    for name, content in {"empty.txt": "", "short.txt": "T", "other.txt": "To Zürich"}.items():
        Path(name).write_text(content)
    Path("latin.txt").write_bytes("Zürich".encode("latin-1"))
    good = {"ctx": "To", "endings": ["be", "not"], "label": 0}
    Path("damaged.jsonl").write_text(json.dumps(good) + "\n{")
    Path("label.jsonl").write_text(json.dumps(good | {"label": 2}))
    Path("endings.jsonl").write_text(json.dumps(good | {"endings": []}))
    Path("other.jsonl").write_text(json.dumps(good | {"ctx": "Zürich"}))
    Path("nothing.jsonl").write_text(json.dumps(good | {"ctx": ""}))
    assert fails(capsys, trained, *options).startswith(message)


def test_models_that_are_not_there(here, capsys):
    assert fails(capsys, "gpt5", "--data", "text.txt").startswith("no pretrained model 'gpt5'; accepted: gpt2, ")
    assert fails(capsys, str(here), "--data", "text.txt").endswith(
        "is not a run folder with weights: it has no config.json"
    )


def test_weights_that_are_no_numbers(trained, here, capsys):
    weights = read_tensors(Path(trained, "model.safetensors"))
    weights["transformer.ln_f.weight"].fill_(math.nan)
    folder = here / "broken"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes(Path(trained, name).read_bytes())
    write_tensors(folder / "model.safetensors", weights)
    for data in (["--data", "text.txt"], ["--choices", "choices.jsonl"]):
        error = fails(capsys, str(folder), *data, "--device", "cpu", "--dtype", "float32", status=1)
        assert error.startswith(
            "the model gives a token a loss of nan: its weights are damaged, or beyond what --dtype"
        )


def test_a_bar_at_a_terminal(trained, here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    cli.main(["eval", trained, "--data", "text.txt", "--choices", "choices.jsonl", "--device", "cpu"])
    said = capsys.readouterr().err
    assert "/19 [" in said
    assert "/5 [" in said
    assert "window" in said
    assert "ending" in said


def test_help_tells_of_everything(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(
        f"--{name.replace('_', '-')}" in out for name in vars(command.EvalConfig("model", data="x")) if name != "model"
    )
