"""A token for each word of a training text."""

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
    """Words and punctuation marks, numbered from the most frequent on; one token for every word it does not know.

    Space is not kept: `decode` puts one between words, and none before a full stop and its like.

    Args:
        words: the vocabulary, each word once.

    Raises:
        ValueError: there are none, or one is there twice or is a special token.
    """

    unknown = 0
    end_of_text: int | None = 1

    def __init__(self, words: list[str]) -> None:
        self.words = [UNKNOWN, END_OF_TEXT, *words]
        if not words or len(set(self.words)) < len(self.words) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"a word tokenizer needs different words, at least one, got {words[:5]!r}")
        self.vocab_size = len(self.words)
        self._ids = {word: index for index, word in enumerate(self.words)}

    @classmethod
    def of_documents(cls, documents: Iterable[str]) -> WordTokenizer:
        """The tokenizer of the words that occur in `documents`."""
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
