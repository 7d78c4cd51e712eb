import gzip
import json

import pytest
import tiktoken
import tiktoken_ext.openai_public
from hypothesis import given
from hypothesis import strategies as st

from gptfast.data import corpus, documents
from gptfast.data.documents import Source

TEXT = "Zürich, naïve 東京.\r\n\tTabs and  spaces,\n\nlines and words\n"


def joined(source: Source) -> list[str]:
    """Whole documents."""
    found, held = [], ""
    for piece in source.pieces():
        held += piece.text
        if piece.last:
            found.append(held)
            held = ""
    assert held == ""
    return found


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 50)
    monkeypatch.setattr(documents, "_MAX_PIECE", 400)


def test_pieces_of_a_text_file_make_the_whole(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes((TEXT * 20).encode())
    source = documents.open_source(str(path))
    assert source.one_document
    assert joined(source) == [TEXT * 20]
    pieces = list(source.pieces())
    assert len(pieces) > 10
    assert max(len(piece.text) for piece in pieces) < 200
    assert sum(piece.consumed for piece in pieces) == source.bytes == path.stat().st_size
    assert "".join(source.documents()) == TEXT * 20


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_cut_changes_no_token(monkeypatch, name: str):
    """With tiktoken's patterns, and a token for every pair of characters, which reveals a wrong cut."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    alphabet = "ab1'. \n\r/é"
    for first in alphabet:
        for second in alphabet:
            ranks.setdefault((first + second).encode(), len(ranks))
    for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(tiktoken_ext.openai_public, load, lambda *files, **hashes: ranks)
    pattern = getattr(tiktoken_ext.openai_public, name)()["pat_str"]
    encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @given(st.text(alphabet, max_size=40), st.text(alphabet, max_size=40))
    def check(before: str, after: str) -> None:
        text = before + "a b" + after
        place = documents._last_cut(text)
        assert place > 0
        parts = encoding.encode_ordinary(text[:place]) + encoding.encode_ordinary(text[place:])
        assert parts == encoding.encode_ordinary(text)

    check()


def test_cut_limits_pieces_without_a_place_to_cut(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("x" * 3000)
    pieces = list(documents.open_source(str(path)).pieces())
    assert max(len(piece.text) for piece in pieces) <= 450
    assert "".join(piece.text for piece in pieces) == "x" * 3000


@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
def test_pieces_of_json_lines_are_a_document_each(tmp_path, packed: bool):
    lines = [json.dumps({"text": TEXT * 3, "id": 1}), "", json.dumps({"text": "short", "id": 2})]
    content = "\n".join(lines).encode()
    path = tmp_path / ("few.jsonl.gz" if packed else "few.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    source = documents.open_source(str(path))
    assert not source.one_document
    assert joined(source) == [TEXT * 3, "short"]
    assert 0 < sum(piece.consumed for piece in source.pieces()) <= source.bytes


def test_pieces_unpack_gzip(tmp_path):
    path = tmp_path / "text.txt.gz"
    path.write_bytes(gzip.compress((TEXT * 9).encode()))
    assert joined(documents.open_source(str(path))) == [TEXT * 9]


def test_open_source_finds_folders_and_patterns(tmp_path):
    files = {"b.txt": "second", "a/z.txt": "first", ".hidden": "no", "c/.git/x": "no", "c/d.md": "third"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert joined(documents.open_source(str(tmp_path))) == ["first", "second", "third"]
    assert joined(documents.open_source(str(tmp_path / "**/*.txt"))) == ["first", "second"]
    assert documents.open_source(str(tmp_path / "*.txt")).one_document


def test_open_source_makes_each_stdlib_module_a_document():
    source = documents.open_source("stdlib")
    assert len(source.texts) > 100
    assert not source.one_document


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.txt", b"fine \xff", r"text.txt is not UTF-8 text: invalid start byte"),
        ("few.jsonl", b'{"text": "a"}\n{"text"', r"few.jsonl, line 2: not JSON"),
        ("few.jsonl", b'{"body": "a", "id": 3}', r"few.jsonl, line 1: no text in the field 'text'; it has: body, id"),
        ("few.jsonl", b"[1]", r"few.jsonl, line 1: no text in the field 'text'; it has: list"),
        ("text.gz", b"not packed", r"text.gz is damaged: Not a gzipped file"),
        ("text.gz", gzip.compress(b"abc" * 1000, mtime=0)[:-12], r"text.gz is damaged: Compressed file ended"),
    ],
)
def test_pieces_name_bad_files(tmp_path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents.open_source(str(tmp_path / name)).pieces())


def test_open_source_makes_a_small_text_one_document():
    source = documents.open_source("clinic")
    assert source.one_document
    assert "".join(source.documents()) == corpus.load_text("clinic")


def test_open_source_rejects_missing_data(tmp_path):
    with pytest.raises(
        ValueError, match=r"no such data: '.*nothing'; accepted: stdlib, .*, sentences, a file, a folder"
    ):
        documents.open_source(str(tmp_path / "nothing"))
