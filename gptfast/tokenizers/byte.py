"""A token for each byte of UTF-8."""

from __future__ import annotations

from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"  # of every tokenizer here, between documents


class ByteTokenizer:
    """The 256 bytes, and the end of text as the 257th token. It has tokens for every text."""

    vocab_size = 257
    end_of_text: int | None = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(END_OF_TEXT.encode() if i == self.end_of_text else bytes([i]) for i in ids)

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> ByteTokenizer:
        return cls()
