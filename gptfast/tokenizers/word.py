"""One token per word of the training text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from gptfast.tokenizers.byte import END_OF_TEXT

UNKNOWN = "<unk>"
_WORD = re.compile("\\w+(?:['\u2019]\\w+)*|[^\\w\\s]")
_NO_SPACE_BEFORE = re.compile(r" (?=[.,;:!?)\]}%])")
_NO_SPACE_AFTER = re.compile(r"(?<=[(\[{]) ")


class WordTokenizer:
    """One token per word or punctuation mark, and one for all unknown words.

    White space is lost: `decode` puts a space between words, and none before a full stop and the like.

    Args:
        words: the vocabulary, each word once.

    Raises:
        ValueError: no words, or one that occurs twice or is a special token.
    """

    unknown = 0
    end_of_text: int | None = 1

    def __init__(self, words: list[str]) -> None:
        self.words = [UNKNOWN, END_OF_TEXT, *words]
        if not words or len(set(self.words)) < len(self.words) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"words must be different words, at least one, got {words[:5]!r}")
        self.vocab_size = len(self.words)
        self._ids = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def of_documents(cls, documents: Iterable[str]) -> WordTokenizer:
        """Build the tokenizer of the words in `documents`, the most frequent first."""
        counts: Counter[str] = Counter()
        for document in documents:
            counts.update(_WORD.findall(document))
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def encode(self, text: str) -> np.ndarray:
        found = (self._ids.get(word, self.unknown) for word in _WORD.findall(text))
        return np.fromiter(found, dtype=np.int64)

    def decode(self, ids: list[int]) -> str:
        text = " ".join(self.words[i] for i in ids)
        return _NO_SPACE_AFTER.sub("", _NO_SPACE_BEFORE.sub("", text))

    def decode_bytes(self, ids: list[int]) -> bytes:
        return self.decode(ids).encode()

    def to_json(self) -> dict[str, Any]:
        return {"kind": "word", "words": self.words[2:]}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> WordTokenizer:
        return cls(list(saved["words"]))
