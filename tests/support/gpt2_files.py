"""Files in the format and size of GPT-2's vocabulary, with made-up merges: pairs of bytes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiktoken
from tiktoken_ext import openai_public

from gptfast.tokenizers.byte import END_OF_TEXT

PUBLISHED = ("encoder.json", "vocab.bpe")


def write(folder: Path, names: tuple[str, str] = PUBLISHED) -> None:
    """Write the token ids and the merges to files of these names."""
    printable = [chr(byte) for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    letters = printable + [chr(256 + place) for place in range(256 - len(printable))]
    pairs = [(first, second) for first in letters for second in letters][:50_000]
    tokens = [*letters, *("".join(pair) for pair in pairs), END_OF_TEXT]
    ids, merges = names
    (folder / ids).write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / merges).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@contextmanager
def accepted() -> Iterator[None]:
    """Skip tiktoken's check of their checksums."""
    read = tiktoken.load.data_gym_to_mergeable_bpe_ranks

    def unchecked(vocab_bpe_file: str, encoder_json_file: str, **checksums: str) -> dict[bytes, int]:
        return read(vocab_bpe_file, encoder_json_file)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", unchecked)
        yield
