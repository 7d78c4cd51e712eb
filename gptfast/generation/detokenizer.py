"""Incremental detokenizer: text from tokens as they arrive, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import TypeVar

from gptfast.tokenizers import CharTokenizer, Tokenizer, WordTokenizer

_Text = TypeVar("_Text", str, bytes)


class TextStream:
    """Text of tokens, returned as soon as no later token can change it.

    The pieces add up to `tokenizer.decode` of all tokens, cut before the first stop string. The first is the one that
    ends first, and the longest of those that end together, wherever tokens begin and end. The stream holds back the
    bytes of an unfinished character and a possible beginning of a stop string.

    Each token is decoded once, together with the token before it, because a word's spacing depends on its neighbour.

    Args:
        tokenizer: the tokens' tokenizer.
        stop: strings before which the stream ends.
        after: the token before the first, whose text is not in the stream.

    Raises:
        ValueError: `stop` is a string, or holds an empty string or something that is no string.
    """

    finished: bool
    """True after a stop string; no text follows."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: int | None = None) -> None:
        if isinstance(stop, str):  # else each letter would be a stop string
            raise ValueError(f"stop must be a sequence of strings, got {stop!r}; accepted: [{stop!r}]")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop strings must be strings of at least one character, got {text!r}")
        self.finished = False
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        # their tokens are whole characters, among them surrogates, which UTF-8 cannot encode
        self._is_text = isinstance(tokenizer, CharTokenizer | WordTokenizer)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous = [] if after is None else [after]
        self._held = ""
        self._flushed = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain with it; "" once `finished`.

        Raises:
            ValueError: a token out of range, or after `flush`.
        """
        if self._flushed:
            raise ValueError("a token after the end of the stream, which flush() is; make a new TextStream")
        if not 0 <= token < self._tokenizer.vocab_size:
            raise ValueError(f"token {token} is out of range; accepted: 0 to {self._tokenizer.vocab_size - 1}")
        if self.finished:
            return ""
        if self._is_text:
            text = self._added(self._tokenizer.decode, token)
        else:
            text = self._utf8.decode(self._added(self._tokenizer.decode_bytes, token))
        self._previous = [token]
        return self._release(text)

    def flush(self) -> str:
        """End the stream and return the text held back, with U+FFFD for an unfinished character; then ""."""
        ended, self._flushed = self._flushed or self.finished, True
        if ended:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _added(self, decode: Callable[[list[int]], _Text], token: int) -> _Text:
        return decode([*self._previous, token])[len(decode(self._previous)) :]

    def _release(self, text: str) -> str:
        """Append `text` to the text held back, return the certain part and hold back the rest."""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.finished, self._held = True, ""
            return text[: min(found)[1]]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
