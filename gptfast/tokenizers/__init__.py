"""Tokenizers behind one small interface, saved as JSON.

    char            a token per character of the training text
    byte            a token per byte of UTF-8
    word            a token per word of the training text, and one for all others
    gpt2, ...       the byte-pair encodings of `tiktoken`

Every tokenizer has an end-of-text token between documents; the char tokenizer only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gptfast.tokenizers.bpe import TiktokenTokenizer, encoding_names
from gptfast.tokenizers.byte import ByteTokenizer
from gptfast.tokenizers.char import CharTokenizer
from gptfast.tokenizers.word import WordTokenizer

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "for_documents",
    "from_json",
    "text_bytes",
]


class Tokenizer(Protocol):
    """Interface of a tokenizer that preparation, training and generation use."""

    vocab_size: int
    end_of_text: int | None
    """Token between documents, None where there is none."""

    def encode(self, text: str) -> np.ndarray:
        """Encode a text as [N] int64 token ids. Special tokens in it are plain text.

        Raises:
            ValueError: a character without a token.
        """
        ...

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Decode token ids to UTF-8, which may begin and end inside a character."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Decode token ids to text, with replacement characters for invalid UTF-8."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the content from which `from_json` builds the same tokenizer on any machine."""
        ...


def for_documents(
    name: str, documents: Iterable[str], end_of_text: bool = False, vocabulary: str | Path | None = None
) -> Tokenizer:
    """Build the tokenizer of a name for training texts.

    Args:
        name: "char", "byte", "word" or a tiktoken encoding.
        documents: the texts; "char" and "word" read them once.
        end_of_text: give "char" an end-of-text token; the others always have one.
        vocabulary: folder with the files of a tiktoken encoding, for machines without a network.

    Raises:
        ValueError: an unknown name, or a vocabulary that is missing or cannot be downloaded.
    """
    if vocabulary is not None and name not in encoding_names():
        raise ValueError(
            f"a vocabulary folder was given for tokenizer {name!r}; accepted: {', '.join(encoding_names())}"
        )
    if name == "char":
        return CharTokenizer.of_documents(documents, end_of_text)
    if name == "byte":
        return ByteTokenizer()
    if name == "word":
        return WordTokenizer.of_documents(documents)
    if name in encoding_names():
        return TiktokenTokenizer.named(name, vocabulary)
    raise ValueError(f"unknown tokenizer {name!r}; accepted: char, byte, word, {', '.join(encoding_names())}")


def text_bytes(tokenizer: Tokenizer, ids: np.ndarray) -> int | None:
    """Count the UTF-8 bytes of token ids [N], without ends of documents; None for words, which drop white space."""
    if isinstance(tokenizer, WordTokenizer):
        return None
    if tokenizer.end_of_text is not None:
        ids = ids[ids != tokenizer.end_of_text]
    return len(tokenizer.decode_bytes(ids.tolist()))


_KINDS: dict[Any, Callable[[dict[str, Any]], Tokenizer]] = {
    "char": CharTokenizer.from_json,
    "byte": ByteTokenizer.from_json,
    "word": WordTokenizer.from_json,
    "tiktoken": TiktokenTokenizer.from_json,
}


def from_json(saved: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer that `to_json` described.

    Raises:
        ValueError: JSON that `to_json` has not written.
    """
    kind = saved.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"not a saved tokenizer: kind {kind!r}; accepted: {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](saved)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a saved {kind} tokenizer: {type(error).__name__}: {error}") from error
