"""Documents from text files, JSON lines, folders and patterns, a piece at a time: a file need not fit into memory."""

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
_LONGEST = 2**24  # characters of a piece that has no good place to be cut
_JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Piece:
    """A part of a document.

    Args:
        text: of the part.
        last: whether the document ends with it.
        consumed: bytes of the source that were read for it.
    """

    text: str
    last: bool
    consumed: int = 0


@dataclass(frozen=True)
class Source:
    """Where documents come from: files, or texts that are there already.

    Args:
        files: to be read one after the other.
        texts: documents as they are.
        field: of JSON lines that holds a document's text.
    """

    files: tuple[Path, ...] = ()
    texts: tuple[str, ...] = ()
    field: str = "text"

    @property
    def bytes(self) -> int:
        """Size of it all, as it lies on the disk."""
        return sum(path.stat().st_size for path in self.files) + sum(len(text.encode()) for text in self.texts)

    @property
    def one_document(self) -> bool:
        """Whether all of it is a single text."""
        names = [path.name.removesuffix(".gz") for path in self.files]
        return len(names) + len(self.texts) == 1 and not any(name.endswith(_JSON_LINES) for name in names)

    def pieces(self) -> Iterator[Piece]:
        """All documents, piece by piece.

        Raises:
            ValueError: a file that cannot be read, is not UTF-8, or is not JSON lines with that field.
        """
        for text in self.texts:
            yield from _cut([text], lambda: 0)
            # consumed at its end
            yield Piece("", last=True, consumed=len(text.encode()))
        for path in self.files:
            yield from _of_file(path, self.field)

    def documents(self) -> Iterator[str]:
        """The texts of all pieces, for whoever needs no boundaries."""
        for piece in self.pieces():
            yield piece.text


def source(name: str, field: str = "text") -> Source:
    """The documents that a name stands for.

    Args:
        name: one of `corpus.NAMES`, a file, a folder (all files below it that are not hidden), or a pattern such as
            "texts/**/*.txt". Files that end in .jsonl, .ndjson or .json are JSON lines, each a document; all others are
            UTF-8 text, each a document; .gz after either is unpacked.
        field: of JSON lines that holds the text.

    Raises:
        ValueError: nothing is there.
    """
    if name == "stdlib":
        return Source(texts=tuple(corpus.standard_library_modules()))
    if name in corpus.NAMES:
        return Source(texts=(corpus.load(name),))
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


def _of_file(path: Path, field: str) -> Iterator[Piece]:
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
                # line ends as they are
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
            raise ValueError(f"{path}, line {number}: no text in the field {field!r}; there is: {fields}")
        yield Piece(text, last=True, consumed=consumed())


def _cut(blocks: Iterable[str], consumed: Callable[[], int]) -> Iterator[Piece]:
    """One document in pieces, none of which is its last."""
    held = ""
    for block in blocks:
        held += block
        if len(held) < PIECE:
            continue
        place = _last_place(held)
        if place == 0:
            if len(held) < _LONGEST:
                continue
            place = len(held)
        yield Piece(held[:place], last=False, consumed=consumed())
        held = held[place:]
    if held:
        yield Piece(held, last=False, consumed=consumed())


def _last_place(text: str) -> int:
    """Where a text can be cut without any tokenizer noticing: before a space between two words. 0 if nowhere.

    Byte-pair encodings look ahead over white space and join marks and line ends; they begin anew at such a space.
    """
    place = text.rfind(" ", 1, len(text) - 1)
    while place > 0 and not (text[place - 1].isalnum() and text[place + 1].isalnum()):
        place = text.rfind(" ", 1, place)
    return max(place, 0)
