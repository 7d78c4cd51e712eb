"""Byte-pair encodings of `tiktoken`, from the network, its cache or a folder."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gptfast.tokenizers.byte import END_OF_TEXT

if TYPE_CHECKING:
    import tiktoken


_AT_HUGGING_FACE = {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}


class TiktokenTokenizer:
    """Byte-pair encoding. It is saved with its vocabulary, so that a trained model needs no network later.

    Args:
        encoding: a tiktoken encoding.
    """

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.pattern: str = encoding._pat_str
        """Regular expression that splits text into the pieces in which bytes are merged."""
        self.ranks: dict[bytes, int] = encoding._mergeable_ranks
        """Ids of the tokens; a lower id is an earlier merge."""
        self.special_tokens: dict[str, int] = encoding._special_tokens
        self.end_of_text: int | None = self.special_tokens.get(END_OF_TEXT)

    @classmethod
    def named(cls, name: str, vocabulary: str | Path | None = None) -> TiktokenTokenizer:
        """Load an encoding.

        Args:
            name: name of the encoding, such as "gpt2".
            vocabulary: folder with its files under their published names: encoder.json and vocab.bpe for "gpt2" (or
                vocab.json and merges.txt, as Hugging Face names them), NAME.tiktoken for others. If None, they are
                downloaded once, or read from the folder TIKTOKEN_CACHE_DIR.

        Raises:
            ValueError: files that are missing, have another checksum or cannot be downloaded.
        """
        import tiktoken

        if vocabulary is not None:
            with _reading_from(Path(vocabulary)):
                return cls(tiktoken.Encoding(**_constructor(name)()))
        try:
            return cls(tiktoken.get_encoding(name))
        except OSError as error:  # requests' errors are OSErrors
            raise ValueError(
                f"the vocabulary of tokenizer {name!r} could not be downloaded ({type(error).__name__}); give a folder "
                "with its files (--vocabulary FOLDER, or TIKTOKEN_CACHE_DIR), or use the byte or char tokenizer"
            ) from error

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._encoding.encode_ordinary(text), dtype=np.int64)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def to_json(self) -> dict[str, Any]:
        ranks = {base64.b64encode(token).decode(): rank for token, rank in self.ranks.items()}
        return {
            "kind": "tiktoken",
            "name": self.name,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "ranks": ranks,
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TiktokenTokenizer:
        import tiktoken

        ranks = {base64.b64decode(token): rank for token, rank in saved["ranks"].items()}
        return cls(
            tiktoken.Encoding(
                saved["name"],
                pat_str=saved["pattern"],
                mergeable_ranks=ranks,
                special_tokens=saved["special_tokens"],
            )
        )


def encoding_names() -> list[str]:
    """List the names that `TiktokenTokenizer.named` accepts."""
    import tiktoken

    return tiktoken.list_encoding_names()


def _constructor(name: str) -> Any:
    from tiktoken import registry

    registry.list_encoding_names()  # fills the table
    constructors = registry.ENCODING_CONSTRUCTORS or {}
    return constructors[name]


@contextmanager
def _reading_from(folder: Path) -> Iterator[None]:
    """Make tiktoken read its files from a folder, under their own names or those of its cache."""
    from tiktoken import load

    def read(blobpath: str, expected_hash: str | None = None) -> bytes:
        name = blobpath.rpartition("/")[2]
        cached = hashlib.sha1(blobpath.encode()).hexdigest()
        for path in (folder / name, folder / _AT_HUGGING_FACE.get(name, name), folder / cached):
            if path.is_file():
                content = path.read_bytes()
                if expected_hash is not None and hashlib.sha256(content).hexdigest() != expected_hash:
                    raise ValueError(f"{path} is not the {name} that tiktoken knows: its checksum does not match")
                return content
        raise ValueError(f"the vocabulary folder {folder} has no {name}; it is at {blobpath}")

    before = load.read_file_cached
    load.read_file_cached = read
    try:
        yield
    finally:
        load.read_file_cached = before
