"""Tokenizers that need no download."""

from __future__ import annotations

import tiktoken

from gptfast.tokenizers import TiktokenTokenizer


def small_tiktoken(*merges: bytes) -> TiktokenTokenizer:
    """Bytes 0 to 255, then `merges`, then an end of text. A space joins the word after it, as in GPT-2."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    special = {"<|endoftext|>": len(ranks)}
    return TiktokenTokenizer(
        tiktoken.Encoding("gpt2", pat_str=r" ?\S+|\s+", mergeable_ranks=ranks, special_tokens=special)
    )
