"""One token per byte of UTF-8."""

from __future__ import annotations

from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"  # token between documents, in all tokenizers


class ByteTokenizer:
    """The 256 bytes, and an end-of-text token. It encodes every text."""

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
