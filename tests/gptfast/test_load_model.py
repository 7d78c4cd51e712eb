from pathlib import Path

import pytest
import tiktoken
import torch

from gptfast import GPT, GPTConfig, load_model
from gptfast.huggingface import tokenizer
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer
from tests.support import gpt2_files

CPU = torch.device("cpu")


def export(path: Path, vocab_size: int, tokens=None) -> Path:
    GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=4)).save_pretrained(path, tokens)
    return path


@pytest.fixture
def with_vocabulary(tmp_path) -> Path:
    """A model of GPT-2's vocabulary beside tokenizer files in Hugging Face's format."""
    path = export(tmp_path / "model", 50257)
    gpt2_files.write(path, tokenizer.GPT2_FILES)
    return path


def test_load_names_what_a_folder_lacks(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"is not a run folder with weights: it has no config.json"):
            load_model.load(tmp_path, CPU)
        (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no pretrained model 'gpt5'"):
        load_model.load("gpt5", CPU)


def test_load_takes_the_tokenizer_named_where_a_model_has_none(tmp_path, monkeypatch):
    path = export(tmp_path / "model", 257)
    assert isinstance(load_model.load(path, CPU, "byte")[1], ByteTokenizer)
    for name in ("char", "word"):
        with pytest.raises(ValueError, match=f"has no tokenizer, and '{name}' needs"):
            load_model.load(path, CPU, name)
    asked = []
    monkeypatch.setattr(
        "gptfast.tokenizers.for_documents",
        lambda *names, **options: asked.append((*names, options)) or CharTokenizer("ab"),
    )
    with pytest.raises(ValueError, match="has a vocabulary of 257 tokens, tokenizer 'o200k' has 2"):
        load_model.load(path, CPU, "o200k", "folder")
    assert asked == [("o200k", [], {"vocabulary": "folder"})]


def test_load_prefers_the_hub_to_a_folder_called_gpt2_without_a_model(tmp_path, monkeypatch):
    """The folder may hold the vocabulary of the encoding."""
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    cached = export(tmp_path / "cached", 257)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: cached)
    assert load_model.load("gpt2", CPU, "byte")[0].config.vocab_size == 257


def test_load_reads_gpt2s_tokenizer_from_its_files(with_vocabulary, monkeypatch):
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail(f"{url} was asked for"))
    with gpt2_files.accepted():
        _, found = load_model.load(str(with_vocabulary), CPU)
        again = TiktokenTokenizer.named("gpt2", with_vocabulary)
    assert (found.name, found.vocab_size) == ("gpt2", 50257)
    assert found.decode(found.encode("To be, or not").tolist()) == "To be, or not"
    assert again.to_json() == found.to_json()


def test_with_tokenizer_ignores_files_of_another_vocabulary(with_vocabulary, tmp_path):
    assert load_model.with_tokenizer(with_vocabulary)[1] is None  # by the checksums
    larger = export(tmp_path / "larger", 50258)
    gpt2_files.write(larger, tokenizer.GPT2_FILES)
    (with_vocabulary / "merges.txt").unlink()
    with gpt2_files.accepted():
        assert load_model.with_tokenizer(larger)[1] is None
        assert load_model.with_tokenizer(with_vocabulary)[1] is None


def test_with_tokenizer_prefers_the_exported_tokenizer(with_vocabulary):
    (with_vocabulary / tokenizer.OWN_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"gptfast_tokenizer\.json holds no tokenizer"), gpt2_files.accepted():
        load_model.with_tokenizer(str(with_vocabulary))
