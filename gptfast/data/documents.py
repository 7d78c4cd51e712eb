"""Streams of documents from text files, JSON lines, folders and glob patterns. A file need not fit into memory."""

from __future__ import annotations

import glob
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptfast.data import corpus

PIECE = 2**20  # characters, about
_MAX_PIECE = 2**24  # characters of a piece without a place to cut
_JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Piece:
    """Part of a document.

    Args:
        text: its characters.
        last: True for the last piece of a document.
        consumed: bytes of the source that were read for it.
    """

    text: str
    last: bool
    consumed: int = 0


@dataclass(frozen=True)
class Source:
    """Documents in files or in memory.

    Args:
        files: read one after the other.
        texts: documents in memory.
        field: field of a JSON line that holds a document's text.
    """

    files: tuple[Path, ...] = ()
    texts: tuple[str, ...] = ()
    field: str = "text"

    @property
    def bytes(self) -> int:
        """Size of the files, compressed if they are, and of the texts."""
        return sum(path.stat().st_size for path in self.files) + sum(len(text.encode()) for text in self.texts)

    @property
    def one_document(self) -> bool:
        """True if the source is a single text."""
        names = [path.name.removesuffix(".gz") for path in self.files]
        return len(names) + len(self.texts) == 1 and not any(name.endswith(_JSON_LINES) for name in names)

    def pieces(self) -> Iterator[Piece]:
        """Yield all documents piece by piece.

        Raises:
            ValueError: a file that cannot be read, is not UTF-8, or is not JSON lines with that field.
        """
        for text in self.texts:
            yield from _cut([text], lambda: 0)
            yield Piece("", last=True, consumed=len(text.encode()))
        for path in self.files:
            yield from _read_file(path, self.field)

    def documents(self) -> Iterator[str]:
        """Yield the texts of all pieces, without document boundaries."""
        for piece in self.pieces():
            yield piece.text


def open_source(name: str, field: str = "text") -> Source:
    """Find the documents of a name.

    Args:
        name: one of `corpus.NAMES`, a file, a folder (all files below it that are not hidden), or a glob pattern such
            as "texts/**/*.txt". Each line of a .jsonl, .ndjson or .json file is a document; every other file is a
            document in UTF-8. Either may be compressed, with .gz appended to the name.
        field: field of a JSON line that holds the text.

    Raises:
        ValueError: no such files.
    """
    if name == "stdlib":
        return Source(texts=tuple(corpus.standard_library_modules()))
    if name in corpus.NAMES:
        return Source(texts=(corpus.load_text(name),))
    path = Path(name).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = corpus.visible_files(path)
    else:
        files = [Path(found) for found in glob.glob(str(path), recursive=True) if Path(found).is_file()]
    if not files:
        raise ValueError(
            f"no such data: {name!r}; accepted: {', '.join(corpus.NAMES)}, a file, a folder with files, or a pattern"
        )
    return Source(files=tuple(sorted(files)), field=field)


def _read_file(path: Path, field: str) -> Iterator[Piece]:
    try:
        with path.open("rb") as raw:
            packed = path.name.endswith(".gz")
            binary: BinaryIO = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
            position = 0

            def consumed() -> int:
                nonlocal position
                before, position = position, raw.tell()
                return position - before

            if path.name.removesuffix(".gz").endswith(_JSON_LINES):
                yield from _json_lines(path, binary, field, consumed)
            else:
                # newline="": line ends unchanged
                reader = io.TextIOWrapper(binary, encoding="utf-8", newline="")
                yield from _cut(iter(lambda: reader.read(PIECE), ""), consumed)
                yield Piece("", last=True, consumed=consumed())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} near byte {error.start}") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error


def _json_lines(path: Path, binary: Iterable[bytes], field: str, consumed: Callable[[], int]) -> Iterator[Piece]:
    for number, line in enumerate(binary, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        text = entry.get(field) if isinstance(entry, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{path}, line {number}: no text in the field {field!r}; it has: {fields}")
        yield Piece(text, last=True, consumed=consumed())


def _cut(blocks: Iterable[str], consumed: Callable[[], int]) -> Iterator[Piece]:
    """Cut a document into pieces, none of them marked as its last."""
    held = ""
    for block in blocks:
        held += block
        if len(held) < PIECE:
            continue
        place = _last_cut(held)
        if place == 0:
            if len(held) < _MAX_PIECE:
                continue
            place = len(held)
        yield Piece(held[:place], last=False, consumed=consumed())
        held = held[place:]
    if held:
        yield Piece(held, last=False, consumed=consumed())


def _last_cut(text: str) -> int:
    """Find the last place for a cut that changes no tokens: before a space between two words. 0 if there is none.

    Byte-pair encodings look ahead over white space and join punctuation and line ends, but start a piece at such a
    space.
    """
    place = text.rfind(" ", 1, len(text) - 1)
    while place > 0 and not (text[place - 1].isalnum() and text[place + 1].isalnum()):
        place = text.rfind(" ", 1, place)
    return max(place, 0)
