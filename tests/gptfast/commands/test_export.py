"""`gptfast export`: transformers and gptfast load the exported folder and write the same text."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from gptfast import GPT, GPTConfig
from gptfast.checkpoint import run_folder
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, WordTokenizer
from tests.support.command_line import error
from tests.support.command_line import output as printed
from tests.support.small_tokenizers import small_tiktoken

TEXT = "To be, or not to be, that is the question"


def write_run(path: Path, tokens: Tokenizer | None = None, **settings) -> GPT:
    tokens = tokens or CharTokenizer.of_documents([TEXT])
    config = {"block_size": 32, "vocab_size": tokens.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 16, **settings}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**config, init_std=0.5)).eval()
    with run_folder.RunFolder(path) as folder:
        folder.write_json("config.json", {"model": config})
        folder.write_json("tokenizer.json", tokens.to_json())
        folder.write_tensors("model.safetensors", {name: p.detach() for name, p in model.named_parameters()})
    return model


def refused(capsys, *arguments: str) -> str:
    """The error line of a command that writes nothing."""
    before = sorted(Path().rglob("*"))
    line = error(capsys, *arguments)
    assert sorted(Path().rglob("*")) == before
    return line


def test_transformers_writes_the_same_text(here, capsys):
    """From text to text, with the tokenizer of the exported folder."""
    model = write_run(here / "run", pad_vocab_size_to=64)
    line = printed(capsys, "export", "run", "folder/out")
    parameters = model.get_num_params(non_embedding=False)
    assert line.startswith(f"a model of {parameters:,} parameters and its tokenizer in folder/out, ")

    theirs = transformers.AutoModelForCausalLM.from_pretrained("folder/out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("folder/out")
    found = theirs.generate(
        **tokenizer("To be", return_tensors="pt"), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    options = ["--prompt", "To be", "--max-new-tokens", "20", "--temperature", "0", "--device", "cpu"]
    assert tokenizer.decode(found[0]) + "\n" == printed(capsys, "generate", "run", *options)


def test_an_exported_model_loads_again(here, capsys):
    model = write_run(here / "run")
    printed(capsys, "export", "run", "out")
    for name, tensor in GPT.from_pretrained("out").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert run_folder.is_run(Path("run"))
    assert not run_folder.is_run(Path("out"))
    assert "out is not a run folder: its config.json is that of a model in" in refused(capsys, "export", "out", "again")


TOKENIZERS = {
    "char": CharTokenizer.of_documents([TEXT]),
    "char with an end": CharTokenizer.of_documents([TEXT], end_of_text=True),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.of_documents([TEXT]),
    "tiktoken": small_tiktoken(b" t", b"or"),
}


@pytest.mark.parametrize("tokens", TOKENIZERS.values(), ids=TOKENIZERS)
def test_commands_accept_an_exported_folder(here, capsys, tokens):
    """Commands that load a model find its tokenizer."""
    write_run(here / "run", tokens)
    printed(capsys, "export", "run", "out")
    Path("text.txt").write_text(TEXT * 20)
    generate = ["--prompt", "To be", "--max-new-tokens", "9", "--temperature", "0", "--device", "cpu"]
    assert printed(capsys, "generate", "out", *generate) == printed(capsys, "generate", "run", *generate)
    evaluate = ["--data", "text.txt", "--limit", "3", "--device", "cpu", "--dtype", "float32", "--json"]
    found, expected = (json.loads(printed(capsys, "eval", name, *evaluate)) for name in ("out", "run"))
    assert found["data"] == expected["data"]
    train = "train gpt2 --init-from out --data text.txt --device cpu --out on --steps 1 --batch-size 2 --accumulation 1"
    printed(capsys, *train.split(), "--eval-batches", "1", "--block-size", "8", "--sample-tokens", "0")
    assert json.loads(Path("on/tokenizer.json").read_text()) == tokens.to_json()


def test_a_tokenizer_that_does_not_fit_is_rejected(here, capsys):
    write_run(here / "run")
    printed(capsys, "export", "run", "out")
    path = Path("out/gptfast_tokenizer.json")
    for content, message in (
        ({"kind": "byte"}, "out has a vocabulary of 15 tokens, its gptfast_tokenizer.json has 257"),
        ({"kind": "char"}, f"{path} holds no tokenizer: not a saved char tokenizer: KeyError: 'chars'"),
        ({}, f"{path} holds no tokenizer: not a saved tokenizer: kind None; accepted: char, byte, word, tiktoken"),
        ([], f"{path} is damaged: a JSON object is needed"),
    ):
        path.write_text(json.dumps(content))
        for arguments in (["generate", "out"], ["train", "gpt2", "--init-from", "out", "--out", "on"]):
            assert refused(capsys, *arguments).startswith(message)
    GPT.from_pretrained("out")  # needs no tokenizer


def test_all_files_have_the_same_permissions(here, capsys):
    write_run(here / "run")
    printed(capsys, "export", "run", "out")
    usual = (here / "run/config.json").stat().st_mode
    assert {path.stat().st_mode for path in (here / "out").iterdir()} == {usual}


def test_the_end_of_text_is_that_of_the_tokenizer(here, capsys):
    tokens = CharTokenizer.of_documents([TEXT], end_of_text=True)
    write_run(here / "run", tokens)
    printed(capsys, "export", "run", "out")
    config = transformers.AutoConfig.from_pretrained("out")
    assert config.eos_token_id == tokens.end_of_text == transformers.AutoTokenizer.from_pretrained("out").eos_token_id


def test_without_the_tokenizer(here, capsys):
    write_run(here / "run", CharTokenizer("a\udc80b"))
    assert "has the lone surrogate U+DC80" in refused(capsys, "export", "run", "out")
    assert "parameters in out, for" in printed(capsys, "export", "run", "out", "--no-tokenizer")
    assert sorted(path.name for path in Path("out").iterdir()) == ["config.json", "model.safetensors"]


def test_without_biases(here, capsys):
    write_run(here / "run", bias=False)
    printed(capsys, "export", "run", "out")
    transformers.AutoModelForCausalLM.from_pretrained("out")
    assert not GPT.from_pretrained("out").config.bias


def test_bad_folders_are_rejected(here, capsys):
    write_run(here / "run")
    assert refused(capsys, "export", "none", "out") == "none is not a run folder with weights: it has no config.json"
    assert refused(capsys, "export", "run", "run") == "run is not empty; give a new folder"
    assert refused(capsys, "export", "run").startswith("Missing from gptfast export: FOLDER")
    content = bytearray(Path("run/model.safetensors").read_bytes())
    content[-5] ^= 1
    Path("run/model.safetensors").write_bytes(content)
    assert refused(capsys, "export", "run", "out") == "run/model.safetensors is damaged: its checksum does not match"
