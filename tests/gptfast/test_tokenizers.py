import base64
import hashlib
import json

import numpy as np
import pytest
import tiktoken
import tiktoken.load
from hypothesis import given
from hypothesis import strategies as st

from gptfast import tokenizers
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer, WordTokenizer
from gptfast.tokenizers.byte import END_OF_TEXT

TEXT = "Zürich, naïve 東京 \U0001f600\n\ttabs\r\n"


# an encoding of the 256 bytes and one merge, which needs no download
RANKS = {bytes([byte]): byte for byte in range(256)} | {b"th": 256}
SETTINGS = {"name": "tiny", "pat_str": r"\S+|\s+", "special_tokens": {END_OF_TEXT: 257}}
TINY = tiktoken.Encoding(**SETTINGS, mergeable_ranks=RANKS)

ALL = {
    "char": CharTokenizer.of_documents([TEXT], end_of_text=True),
    "char without an end": CharTokenizer.of_documents([TEXT]),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.of_documents([TEXT]),
    "tiktoken": TiktokenTokenizer(TINY),
}
LOSSLESS = {name: tokenizer for name, tokenizer in ALL.items() if name != "word"}


@pytest.mark.parametrize("tokens", LOSSLESS.values(), ids=LOSSLESS)
def test_decode_inverts_encode(tokens):
    ids = tokens.encode(TEXT)
    assert ids.dtype == np.int64
    assert 0 <= ids.min() <= ids.max() < tokens.vocab_size
    assert tokens.decode(ids.tolist()) == TEXT
    assert tokens.decode_bytes(ids.tolist()) == TEXT.encode()
    assert len(tokens.encode("")) == 0


@pytest.mark.parametrize("tokens", ALL.values(), ids=ALL)
def test_from_json_restores_a_tokenizer(tokens):
    again = tokenizers.from_json(json.loads(json.dumps(tokens.to_json())))
    assert type(again) is type(tokens)
    assert (again.vocab_size, again.end_of_text) == (tokens.vocab_size, tokens.end_of_text)
    assert again.encode(TEXT).tolist() == tokens.encode(TEXT).tolist()
    everything = list(range(tokens.vocab_size))
    assert again.decode_bytes(everything) == tokens.decode_bytes(everything)


@pytest.mark.parametrize("tokens", ALL.values(), ids=ALL)
def test_encode_never_gives_the_end_of_text(tokens):
    if tokens.end_of_text is None:
        assert tokens.vocab_size == len(set(TEXT))
        return
    assert tokens.decode([tokens.end_of_text]) == END_OF_TEXT
    try:
        ids = tokens.encode(END_OF_TEXT)
    except ValueError:  # characters that the training text lacks
        return
    assert tokens.end_of_text not in ids


def test_char_keeps_the_saved_order():
    # not in the order of code points, as an older file might have it
    tokens = tokenizers.from_json({"kind": "char", "chars": "zab\n"})
    assert tokens.encode("abz\n").tolist() == [1, 2, 0, 3]
    assert tokens.end_of_text is None


def test_char_names_unknown_characters():
    with pytest.raises(ValueError, match=r"lacks the characters 'xé'; accepted: the 3 of its training text"):
        CharTokenizer("abc", end_of_text=True).encode("axbéc")


@given(st.text())
def test_byte_encodes_every_text(text: str):
    tokens = ByteTokenizer()
    ids = tokens.encode(text).tolist()
    assert tokens.decode_bytes(ids) == text.encode("utf-8", "surrogatepass")
    for half in ids[:1]:
        assert tokens.decode([half]) == (chr(half) if half < 128 else "\ufffd")


def test_word_splits_words_and_punctuation():
    tokens = WordTokenizer.of_documents(["the fox sees the dog.", "Isn't the (old) dog's fox"])
    assert tokens.words[:4] == ["<unk>", END_OF_TEXT, "the", "fox"]
    assert WordTokenizer.of_documents(["d a c", "b a"]).words[2:] == ["a", "b", "c", "d"]  # by frequency, then alphabet
    ids = tokens.encode("the old fox isn't a dog.").tolist()
    assert tokens.decode(ids) == "the old fox <unk> <unk> dog."
    assert tokens.decode(tokens.encode("Isn't  (the\nfox)").tolist()) == "Isn't (the fox)"
    assert tokens.encode("zebra").tolist() == [tokens.unknown]


@pytest.mark.parametrize(
    "text",
    [
        "Wait, what? No! So: this; that.",
        "(a) [b] {c} of 50% - all",
        "It isn't, rock'n'roll; it\u2019s \u00fcber",
    ],
)
def test_word_decodes_spacing_around_punctuation(text: str):
    """No space around marks that have none; apostrophes are part of a word."""
    tokens = WordTokenizer.of_documents([text])
    assert tokens.decode(tokens.encode(text).tolist()) == text
    assert "isn't" not in text or {"isn't", "rock'n'roll", "it\u2019s"} <= set(tokens.words)


@given(st.text())
def test_word_keeps_all_but_white_space(text: str):
    tokens = WordTokenizer.of_documents([text, "a"])
    ids = tokens.encode(text).tolist()
    assert tokens.unknown not in ids
    assert tokens.encode(tokens.decode(ids)).tolist() == ids


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"kind": "bpe"}, "not a saved tokenizer: kind 'bpe'; accepted: char, byte, word, tiktoken"),
        ({"kind": "char"}, "not a saved char tokenizer: KeyError: 'chars'"),
        ({"kind": "char", "chars": 7}, "not a saved char tokenizer: TypeError"),
        ({"kind": "word", "words": ["a", "a"]}, "words must be different words"),
        ({"kind": "word", "words": ["a", "<unk>"]}, "words must be different words"),
        ({"kind": "word", "words": []}, "words must be different words"),
        ({"kind": "tiktoken", "name": "gpt2"}, "not a saved tiktoken tokenizer: KeyError: 'ranks'"),
    ],
)
def test_from_json_rejects_other_content(saved, message):
    with pytest.raises(ValueError, match=message):
        tokenizers.from_json(saved)


def test_for_documents_loads_a_tiktoken_encoding(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: TINY)
    tokens = tokenizers.for_documents("gpt2", [])
    assert tokens.vocab_size == 258
    assert tokens.encode("thé").tolist() == [256, 0xC3, 0xA9]


@pytest.mark.parametrize(
    ("name", "vocabulary", "message"),
    [
        ("gpt2", None, r"vocabulary of tokenizer 'gpt2' could not be downloaded .*--vocabulary FOLDER"),
        ("bert", None, "unknown tokenizer 'bert'; accepted: char, byte, word, gpt2, "),
        ("char", "here", r"vocabulary folder .* 'char'; accepted: gpt2, "),
    ],
)
def test_for_documents_names_the_way_out(monkeypatch, name, vocabulary, message):
    def offline(name):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match=message):
        tokenizers.for_documents(name, ["a"], vocabulary=vocabulary)


def test_for_documents_reads_a_vocabulary_folder(tmp_path, monkeypatch):
    """Files have published names or those of tiktoken's cache, and are checked. Nothing is downloaded."""
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail(f"{url} was asked for"))
    content = b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in RANKS.items())
    url = "https://somewhere/encodings/tiny.tiktoken"
    digest = hashlib.sha256(content).hexdigest()

    def tiny():
        return SETTINGS | {"mergeable_ranks": tiktoken.load.load_tiktoken_bpe(url, expected_hash=digest)}

    monkeypatch.setattr(tokenizers, "encoding_names", lambda: ["tiny"])
    monkeypatch.setattr(tokenizers.bpe, "_constructor", lambda name: tiny)
    with pytest.raises(ValueError, match=rf"the vocabulary folder {tmp_path} has no tiny.tiktoken; it is at {url}"):
        tokenizers.for_documents("tiny", [], vocabulary=tmp_path)
    for name in ("tiny.tiktoken", hashlib.sha1(url.encode()).hexdigest()):
        path = tmp_path / name
        path.write_bytes(content)
        assert tokenizers.for_documents("tiny", [], vocabulary=tmp_path).encode("th").tolist() == [256]
        path.write_bytes(content + b"\n")
        with pytest.raises(ValueError, match=f"{name} is not the tiny.tiktoken that tiktoken knows"):
            tokenizers.for_documents("tiny", [], vocabulary=tmp_path)
        path.unlink()
