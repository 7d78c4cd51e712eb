import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import RepositoryNotFoundError

from gptfast import GPT, GPTConfig, load_model
from gptfast.tokenizers import CharTokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


def store(cache: Path, repository: str, folder: Path) -> None:
    """Copy a folder to the place where the hub's client keeps downloads."""
    place = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(COMMIT)


@pytest.mark.parametrize(
    ("name", "repository"),
    [("gpt2", "openai-community/gpt2"), ("gpt2-xl", "openai-community/gpt2-xl"), ("some-one/their.model", None)],
)
def test_locate_uses_the_cache_offline(cache, folder, name, repository):
    store(cache, repository or name, folder)
    expected = GPT.from_pretrained(str(folder)).state_dict()
    found = GPT.from_pretrained(name).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_locate_offline_names_the_way_out(cache):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        GPT.from_pretrained("gpt2-xl")
    assert "openai-community/gpt2-xl" in str(caught.value)
    assert "(ConnectError: " in str(caught.value)


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        (["tokenizer.json"], "config.json"),
        (["config.json", "tokenizer.json"], "model.safetensors"),
        ([], "config.json"),
    ],
)
def test_locate_rejects_a_partial_cache(cache, folder, tmp_path, kept, missing):
    """Another program has downloaded some files, and the hub cannot be reached for the rest."""
    part = tmp_path / "part"
    part.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    for name in kept:
        shutil.copy(folder / name, part)
    store(cache, "openai-community/gpt2", part)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        GPT.from_pretrained("gpt2")
    snapshot = f"{cache}/models--openai-community--gpt2/snapshots/{COMMIT}"
    assert str(caught.value).startswith(f"openai-community/gpt2 has no {missing} in the cache {snapshot}")


def test_locate_finds_sharded_weights(cache, folder, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    store(cache, "some-one/model", tmp_path / "sharded")
    expected = GPT.from_pretrained(str(folder)).state_dict()
    found = GPT.from_pretrained("some-one/model").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_locate_brings_an_exported_tokenizer(cache, tmp_path):
    """The repository is an exported model."""
    tokens = CharTokenizer("abc")
    model = GPT(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=4), "eager")
    model.save_pretrained(tmp_path / "out", tokens)
    store(cache, "some-one/model", tmp_path / "out")
    _, found = load_model.load("some-one/model", torch.device("cpu"))
    assert found.to_json() == tokens.to_json()


def test_locate_names_a_repository_that_does_not_exist(monkeypatch):
    def missing(name, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)  # its constructor needs a response

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ValueError, match="no local folder no/body, and the Hugging Face hub has no"):
        GPT.from_pretrained("no/body")


def test_locate_downloads_no_pickles(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options) or folder)
    GPT.from_pretrained("gpt2")
    names = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    names += ["gptfast_tokenizer.json", "vocab.json", "merges.txt"]
    others = ["pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "model.fp16.safetensors", "tokenizer.json"]
    wanted = huggingface_hub.utils.filter_repo_objects([*names, *others], allow_patterns=asked["allow_patterns"])
    assert list(wanted) == names


def test_locate_prefers_a_folder_to_the_hub(cache, folder, tmp_path):
    for name in ("gpt2", "some-one/model"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="no local folder openai-community/gpt2"):
        GPT.from_pretrained("gpt2")  # a folder of this name may hold anything
    with pytest.raises(ValueError, match=r"some-one/model has no config.json"):
        GPT.from_pretrained("some-one/model")
    shutil.copytree(folder, tmp_path / "gpt2", dirs_exist_ok=True)
    assert GPT.from_pretrained("gpt2").config.n_embd == 32


def test_from_pretrained_of_a_folder_imports_no_hub(folder):
    code = (
        "import sys; from gptfast import GPT, cli; GPT.from_pretrained(sys.argv[1]);"
        "assert not {'huggingface_hub', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
