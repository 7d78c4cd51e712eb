"""One token per character of the training text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gptfast.tokenizers.byte import END_OF_TEXT


class CharTokenizer:
    """One token per character, numbered in the given order.

    Args:
        chars: the characters, each once.
        end_of_text: add an end-of-text token.

    Raises:
        ValueError: no characters, or one that occurs twice.
    """

    def __init__(self, chars: str, end_of_text: bool = False) -> None:
        if not chars or len(set(chars)) < len(chars):
            raise ValueError(f"chars must be different characters, at least one, got {chars[:20]!r}")
        self.chars = chars
        self.end_of_text = len(chars) if end_of_text else None
        self.vocab_size = len(chars) + (1 if end_of_text else 0)
        code_points = _code_points(chars)
        self._order = np.argsort(code_points, kind="stable")
        self._sorted = code_points[self._order]
        self._texts = [*chars, END_OF_TEXT][: self.vocab_size]

    @classmethod
    def of_documents(cls, documents: Iterable[str], end_of_text: bool = False) -> CharTokenizer:
        """Build the tokenizer of the characters in `documents`, in the order of their code points."""
        found: set[int] = set()
        for document in documents:
            found.update(np.unique(_code_points(document)).tolist())
        return cls("".join(map(chr, sorted(found))), end_of_text)

    def encode(self, text: str) -> np.ndarray:
        points = _code_points(text)
        place = np.searchsorted(self._sorted, points).clip(max=len(self.chars) - 1)
        unknown = self._sorted[place] != points
        if unknown.any():
            missing = "".join(chr(point) for point in np.unique(points[unknown])[:10])
            raise ValueError(
                f"the tokenizer lacks the characters {missing!r}; accepted: the {len(self.chars)} of its training text"
            )
        return self._order[place]

    def decode(self, ids: list[int]) -> str:
        return "".join(self._texts[i] for i in ids)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars, "end_of_text": self.end_of_text is not None}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> CharTokenizer:
        if not isinstance(saved["chars"], str):
            raise TypeError("chars must be a string")
        return cls(saved["chars"], bool(saved.get("end_of_text", False)))


def _code_points(text: str) -> np.ndarray:
    # UTF-32 is code points; surrogatepass accepts any str
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
