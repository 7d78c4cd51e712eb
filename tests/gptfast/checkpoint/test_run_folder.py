import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gptfast import GPT, GPTConfig, load_model
from gptfast.checkpoint import run_folder
from gptfast.tokenizers import CharTokenizer
from tests.support.files import no_space

CONFIG = {"block_size": 8, "vocab_size": 3, "n_layer": 1, "n_head": 2, "n_embd": 8}


def write(path: Path, **settings) -> GPT:
    model = GPT(GPTConfig(**CONFIG | settings))
    with run_folder.RunFolder(path) as folder:
        folder.write_json("config.json", {"model": CONFIG | settings})
        folder.write_json("tokenizer.json", CharTokenizer("abc").to_json())
        folder.write_tensors("model.safetensors", {name: p.detach() for name, p in model.named_parameters()})
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_load_run_returns_the_weights_saved(tmp_path, tied):
    saved = write(tmp_path / "run", tie_weights=tied)
    model, tokenizer = load_model.load_run(tmp_path / "run")
    assert tokenizer.decode([0, 1, 2]) == "abc"
    assert model.config == saved.config
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    stored = safetensors.torch.load_file(tmp_path / "run/model.safetensors")
    assert ("lm_head.weight" in stored) is not tied


def test_run_folder_rejects_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give a new one with --out"):
        run_folder.RunFolder(tmp_path)
    with pytest.raises(ValueError, match=r"cannot create the run folder .*notes.txt/run: Not a directory"):
        run_folder.RunFolder(tmp_path / "notes.txt/run")
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_run_folder_keeps_the_older_file_after_a_failed_write(tmp_path, monkeypatch, call):
    folder = run_folder.RunFolder(tmp_path / "run")
    folder.write_json("summary.json", {"steps": 1})
    folder.append_log({"step": 1})
    monkeypatch.setattr(call, no_space)
    with pytest.raises(OSError, match="No space left"):
        folder.write_json("summary.json", {"steps": 2})
    with pytest.raises(OSError, match="No space left"):
        folder.truncate_log(0)
    assert run_folder.read_log(tmp_path / "run") == [{"step": 1}]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"steps": 1}


def test_run_folder_writes_json(tmp_path):
    """Python's own extension, Infinity and NaN, is not read by other programs."""
    folder = run_folder.RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("summary.json", {"val_loss": float("inf")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.append_log({"loss": float("nan")})
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_run_folder_resumes_a_run(tmp_path):
    with run_folder.RunFolder(tmp_path / "new", resume=True) as folder:
        assert not folder.resumed
    write(tmp_path / "run")
    with run_folder.RunFolder(tmp_path / "run", resume=True) as folder:
        assert folder.resumed
    with pytest.raises(ValueError, match="is not empty; give a new one with --out, or continue it with --resume"):
        run_folder.RunFolder(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="other is not empty; it holds no run to continue"):
        run_folder.RunFolder(tmp_path / "other", resume=True)


def test_run_folder_accepts_what_a_killed_start_left(tmp_path):
    run_folder.RunFolder(tmp_path / "run").close()
    (tmp_path / "run/config.json.partial").write_text("{")
    run_folder.RunFolder(tmp_path / "run").close()


def test_load_run_notices_a_flipped_byte(tmp_path):
    write(tmp_path / "run")
    content = bytearray((tmp_path / "run/model.safetensors").read_bytes())
    content[-5] ^= 1
    (tmp_path / "run/model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: its checksum does not match"):
        load_model.load_run(tmp_path / "run")


def damage(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "is not a run folder with weights: it has no model.safetensors"),
        ("tokenizer.json", None, "it has no tokenizer.json"),
        ("model.safetensors", b"\x00" * 30, "model.safetensors is damaged"),
        ("config.json", b"{", "config.json is damaged"),
        ("config.json", b"[]", "config.json is damaged: a JSON object is needed"),
        ("config.json", b'{"model": {"layers": 3}}', "config.json holds no model settings: .*layers"),
        ("config.json", b'{"model": {"n_head": 5}}', "n_embd must be divisible by n_head"),
        ("tokenizer.json", b"{}", "not a saved tokenizer"),
        ("tokenizer.json", b'{"kind": "char", "chars": ""}', "chars must be .*, got ''"),
        ("tokenizer.json", b'{"kind": "char", "chars": "aba"}', "chars must be .*, got 'aba'"),
        (
            "tokenizer.json",
            b'{"kind": "char", "chars": "ab"}',
            "has a vocabulary of 3 tokens, its tokenizer.json has 2",
        ),
        (
            "config.json",
            json.dumps({"model": CONFIG | {"n_layer": 2}}).encode(),
            "does not fit config.json: it lacks tensor transformer.h.1",
        ),
    ],
)
def test_load_run_rejects_damaged_folders(tmp_path, name, content, message):
    write(tmp_path / "run")
    damage(tmp_path / "run" / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_model.load_run(tmp_path / "run")
    assert "\n" not in str(caught.value)
