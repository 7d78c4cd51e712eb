"""Text from tokens as they come, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TypeVar

from gptfast.tokenizers import CharTokenizer, Tokenizer, WordTokenizer

_Text = TypeVar("_Text", str, bytes)


class TextStream:
    """The text of tokens, given out as soon as no later token can change it.

    What it returns adds up to `tokenizer.decode` of all the tokens, cut before the first stop string. That is the one
    which ends first, of those that end together the longest: wherever tokens begin and end, and however many stop
    strings overlap. Held back are the bytes of an unfinished character and what may be the beginning of a stop string.

    Each token is decoded once, with the one before it: words are written differently after one another.

    Args:
        tokenizer: of the tokens.
        stop: texts before which the stream ends, if any.
        after: the token before the first, of which the stream has nothing: words have a space between them.

    Raises:
        ValueError: an empty stop string, one that is no string, or a string in the place of a sequence.
    """

    finished: bool
    """A stop string has appeared: there is no more text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: int | None = None) -> None:
        if isinstance(stop, str):  # its letters would be stop strings
            raise ValueError(f"stop must be a sequence of strings, got {stop!r}; accepted: [{stop!r}]")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop strings must be strings of at least one character, got {text!r}")
        self.finished = False
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        # their tokens are whole characters, among which may be surrogates, that UTF-8 has no bytes for
        self._characters = isinstance(tokenizer, CharTokenizer | WordTokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before = [] if after is None else [after]  # the last token
        self._held = ""
        self._flushed = False

    def push(self, token: int) -> str:
        """The text that is certain with one more token; "" once `finished`.

        Raises:
            ValueError: a token that is out of range, or that comes after `flush`.
        """
        if self._flushed:
            raise ValueError("a token after the end of the stream, which flush() is; make a new TextStream")
        if not 0 <= token < self._tokenizer.vocab_size:
            raise ValueError(f"token {token} is out of range; accepted: 0 to {self._tokenizer.vocab_size - 1}")
        if self.finished:
            return ""
        if self._characters:
            text = self._added(self._tokenizer.decode, token)
        else:
            text = self._utf8.decode(self._added(self._tokenizer.decode_bytes, token))
        self._before = [token]
        return self._released(text)

    def flush(self) -> str:
        """End the stream: what was held back, with a replacement character for an unfinished one; "" the next time."""
        over, self._flushed = self._flushed or self.finished, True
        if over:
            return ""
        text = self._released(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _added(self, decode: Callable[[list[int]], _Text], token: int) -> _Text:
        return decode([*self._before, token])[len(decode(self._before)) :]

    def _released(self, text: str) -> str:
        """What of the text held back and of `text` after it is certain; the rest is held back."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.finished, self._held = True, ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop`, which it does not contain, begins: as many as possible."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
