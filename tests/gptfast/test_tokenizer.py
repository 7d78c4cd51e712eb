import json

import numpy as np
import pytest
import tiktoken

from gptfast import tokenizer
from gptfast.tokenizer import CharTokenizer

TEXT = "Zürich, naïve 東京 \U0001f600\n\ttabs\r\n"


def test_characters_come_back():
    tokens = CharTokenizer.of_text(TEXT)
    ids = tokens.encode(TEXT)
    assert ids.dtype == np.int64
    assert tokens.vocab_size == len(set(TEXT))
    assert tokens.decode(ids.tolist()) == TEXT
    assert [tokens.chars[i] for i in ids] == list(TEXT)
    assert len(tokens.encode("")) == 0


def test_saved_tokenizers_come_back_from_json():
    # not in the order of code points, as an older file might have it
    tokens = CharTokenizer("zab\n")
    again = tokenizer.from_json(json.loads(json.dumps(tokens.to_json())))
    assert again.encode("abz\n").tolist() == tokens.encode("abz\n").tolist() == [1, 2, 0, 3]


def test_unknown_characters_are_named():
    with pytest.raises(ValueError, match=r"lacks the characters 'xé'; accepted: the 3 of its training text"):
        CharTokenizer("abc").encode("axbéc")


def test_not_a_tokenizer():
    with pytest.raises(ValueError, match="not a saved tokenizer: kind 'bpe'; accepted: char, tiktoken"):
        tokenizer.from_json({"kind": "bpe"})


@pytest.fixture
def small_encoding(monkeypatch):
    """tiktoken's "gpt2" with the 256 bytes and one merge, so that no vocabulary has to be downloaded."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|end|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)


def test_tiktoken_encodings(small_encoding):
    tokens = tokenizer.for_text("gpt2", "any text")
    assert tokens.vocab_size == 258
    assert tokens.encode("thé").tolist() == [256, 0xC3, 0xA9]
    assert tokens.decode([256, 0xC3, 0xA9]) == "thé"
    # special tokens in a text are text
    assert tokens.decode(tokens.encode("<|end|>").tolist()) == "<|end|>"
    assert 257 not in tokens.encode("<|end|>")
    assert isinstance(tokenizer.from_json(tokens.to_json()), tokenizer.TiktokenTokenizer)


def test_a_vocabulary_that_cannot_be_had(monkeypatch):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(
        ValueError, match=r"vocabulary of tokenizer 'gpt2' could not be downloaded .*TIKTOKEN_CACHE_DIR"
    ):
        tokenizer.for_text("gpt2", "")


def test_unknown_tokenizer():
    with pytest.raises(ValueError, match="unknown tokenizer 'bert'; accepted: char, "):
        tokenizer.for_text("bert", "")
