"""Text to token ids and back, behind one small interface, saved as JSON."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """[N] int64 token ids of `text`. Raises ValueError for text it has no tokens for."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...

    def to_json(self) -> dict[str, Any]:
        """What `from_json` makes the same tokenizer of."""
        ...


class CharTokenizer:
    """One token per character, numbered in the order of their code points.

    Args:
        chars: the characters, each once.

    Raises:
        ValueError: there are none, or one is there twice.
    """

    def __init__(self, chars: str) -> None:
        if not chars or len(set(chars)) < len(chars):
            raise ValueError(f"a character tokenizer needs different characters, at least one, got {chars[:20]!r}")
        self.chars = chars
        self.vocab_size = len(chars)
        code_points = _code_points(chars)
        self._order = np.argsort(code_points, kind="stable")
        self._sorted = code_points[self._order]

    @classmethod
    def of_text(cls, text: str) -> CharTokenizer:
        """The tokenizer of the characters that occur in `text`."""
        return cls("".join(chr(point) for point in np.unique(_code_points(text))))

    def encode(self, text: str) -> np.ndarray:
        points = _code_points(text)
        place = np.searchsorted(self._sorted, points).clip(max=self.vocab_size - 1)
        unknown = self._sorted[place] != points
        if unknown.any():
            missing = "".join(chr(point) for point in np.unique(points[unknown])[:10])
            raise ValueError(
                f"the tokenizer lacks the characters {missing!r}; accepted: the {self.vocab_size} of its training text"
            )
        return self._order[place]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars}


class TiktokenTokenizer:
    """A byte-pair encoding of `tiktoken`, by name. Its vocabulary is downloaded once, or read from TIKTOKEN_CACHE_DIR.

    Args:
        name: of the encoding, such as "gpt2".

    Raises:
        ValueError: an unknown encoding, or a vocabulary that is neither cached nor reachable.
    """

    def __init__(self, name: str) -> None:
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"unknown tokenizer {name!r}; accepted: char, {', '.join(tiktoken.list_encoding_names())}")
        try:
            self._encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are OSErrors
            raise ValueError(
                f"the vocabulary of tokenizer {name!r} could not be downloaded ({type(error).__name__}); "
                "set TIKTOKEN_CACHE_DIR to a folder that has it, or use the char tokenizer"
            ) from error
        self.name = name
        self.vocab_size = self._encoding.n_vocab

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._encoding.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "tiktoken", "name": self.name}


def for_text(name: str, text: str) -> Tokenizer:
    """The tokenizer called `name` ("char" or a tiktoken encoding) for a training text."""
    return CharTokenizer.of_text(text) if name == "char" else TiktokenTokenizer(name)


def from_json(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_json` described.

    Raises:
        ValueError: JSON that no tokenizer here has written.
    """
    if saved.get("kind") == "char" and isinstance(saved.get("chars"), str):
        return CharTokenizer(saved["chars"])
    if saved.get("kind") == "tiktoken" and isinstance(saved.get("name"), str):
        return TiktokenTokenizer(saved["name"])
    raise ValueError(f"not a saved tokenizer: kind {saved.get('kind')!r}; accepted: char, tiktoken")


def _code_points(text: str) -> np.ndarray:
    # utf-32 is code points as they are; surrogates pass, so that any str can be encoded
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
