"""Tokenizers as a `tokenizer.json`, with which Hugging Face's `tokenizers` encodes and decodes the same way.

`tokenizer_config.json` sets `split_special_tokens`, so special tokens in a text stay plain text, as in this package. A
third file holds the tokenizer as this package saves it, because a `tokenizer.json` does not record its kind.
"""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from gptfast import tokenizers
from gptfast.checkpoint.atomic_files import read_json
from gptfast.tokenizers import ByteTokenizer, CharTokenizer, TiktokenTokenizer, Tokenizer, WordTokenizer
from gptfast.tokenizers.byte import END_OF_TEXT
from gptfast.tokenizers.word import UNKNOWN

Json = dict[str, Any]
OWN_FILE = "gptfast_tokenizer.json"
GPT2_FILES = ("vocab.json", "merges.txt")

# GPT-2's byte-level alphabet: printable bytes stand for themselves, the others are characters from 256 on
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE} | {
    byte: chr(256 + number) for number, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
# Python's \w and \s in Oniguruma's syntax, whose \w has combining marks and whose \s lacks U+1C to U+1F. Characters
# newer than either library's Unicode version may differ.
_WORD_CHARACTER = r"[\p{L}\p{N}_]"
_WORD = rf"{_WORD_CHARACTER}+(?:['\u2019]{_WORD_CHARACTER}+)*|[^\p{{L}}\p{{N}}_\s\x1c-\x1f]"


def to_files(tokenizer: Tokenizer, block_size: int) -> dict[str, Json]:
    """Return the content of `tokenizer.json`, `tokenizer_config.json` and `OWN_FILE`, by file name.

    Args:
        tokenizer: a tokenizer of this package.
        block_size: the model's longest sequence.

    Raises:
        ValueError: another tokenizer, or a vocabulary that the format cannot hold.
    """
    special = _special_tokens(tokenizer)
    if isinstance(tokenizer, ByteTokenizer):
        content = _bytes()
    elif isinstance(tokenizer, CharTokenizer):
        content = _characters(tokenizer)
    elif isinstance(tokenizer, WordTokenizer):
        content = _words(tokenizer)
    elif isinstance(tokenizer, TiktokenTokenizer):
        content = _byte_pairs(tokenizer, special)
    else:
        raise ValueError(f"tokenizer must be one of gptfast's, got {type(tokenizer).__name__}")
    named = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": UNKNOWN}
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_added(token, number) for token, number in special.items()],
            "normalizer": None,
            "post_processor": None,
            **content,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": block_size,
            # GPT-2 in transformers would embed token types
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,
            **{name: token for name, token in named.items() if token in special},
        },
        OWN_FILE: tokenizer.to_json(),
    }


def read_exported(folder: Path) -> Tokenizer | None:
    """Read the tokenizer that `gptfast export` wrote; None in folders of other programs.

    Raises:
        ValueError: a damaged file.
    """
    path = folder / OWN_FILE
    if not path.is_file():
        return None
    saved = read_json(path)
    try:
        return tokenizers.from_json(saved)
    except ValueError as error:
        raise ValueError(f"{path} holds no tokenizer: {error}") from error


def read_gpt2(folder: Path) -> Tokenizer | None:
    """Read GPT-2's tokenizer from `GPT2_FILES`; None if a folder lacks them or has those of another vocabulary."""
    if not all((folder / name).is_file() for name in GPT2_FILES):
        return None
    try:
        return TiktokenTokenizer.named("gpt2", folder)
    except ValueError:  # other checksums
        return None


def _special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the special tokens in the order of their ids."""
    if isinstance(tokenizer, TiktokenTokenizer):
        return dict(sorted(tokenizer.special_tokens.items(), key=lambda entry: entry[1]))
    unknown = {UNKNOWN: tokenizer.unknown} if isinstance(tokenizer, WordTokenizer) else {}
    return unknown if tokenizer.end_of_text is None else unknown | {END_OF_TEXT: tokenizer.end_of_text}


def _added(token: str, number: int) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": token, **flags}


def _split(pattern: str, drop_others: bool = False) -> Json:
    """Make each match a piece, and what lies between matches a piece too or nothing."""
    behavior = "Removed" if drop_others else "Isolated"
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": drop_others}


def _word_level(vocabulary: dict[str, int], unknown: str) -> Json:
    return {"type": "WordLevel", "vocab": vocabulary, "unk_token": unknown}


def _byte_pair_model(vocabulary: dict[str, int], merges: list[str]) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # or the text of a special token would become that token
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _bytes() -> Json:
    vocabulary = {letter: byte for byte, letter in sorted(_LETTERS.items())}
    return {
        "pre_tokenizer": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": _byte_pair_model(vocabulary, []),
    }


def _characters(tokenizer: CharTokenizer) -> Json:
    lone = next((char for char in tokenizer.chars if "\ud800" <= char <= "\udfff"), None)
    if lone is not None:
        raise ValueError(
            f"the tokenizer has the lone surrogate U+{ord(lone):04X}, which a tokenizer.json cannot hold; export "
            "with --no-tokenizer"
        )
    vocabulary = {char: number for number, char in enumerate(tokenizer.chars)}
    return {
        "pre_tokenizer": _split(r"[\s\S]"),
        "decoder": {"type": "Fuse"},
        # no unknown token: an unknown character is an error, as in this package
        "model": _word_level(vocabulary, unknown=""),
    }


def _words(tokenizer: WordTokenizer) -> Json:
    vocabulary = {word: number for number, word in enumerate(tokenizer.words)}
    replacements = [_removed_space(r" (?=[.,;:!?)\]}%])"), _removed_space(r"(?<=[(\[{]) ")]
    # WordPiece puts a space before every token without its prefix, and no word starts with a space
    spaces = {"type": "WordPiece", "prefix": " ", "cleanup": False}
    return {
        "pre_tokenizer": _split(_WORD, drop_others=True),
        "decoder": {"type": "Sequence", "decoders": [spaces, {"type": "Fuse"}, *replacements]},
        "model": _word_level(vocabulary, UNKNOWN),
    }


def _removed_space(pattern: str) -> Json:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}


def _byte_pairs(tokenizer: TiktokenTokenizer, special: dict[str, int]) -> Json:
    # with special tokens, because ids may have gaps before theirs
    vocabulary = {_shown(token): rank for token, rank in tokenizer.ranks.items()} | special
    merges = [f"{_shown(left)} {_shown(right)}" for left, right in _merges(tokenizer.ranks)]
    # Oniguruma reads a possessive {1,3}+ as a nested repetition; no pattern of tiktoken backtracks there, so greedy is
    # the same
    pattern = re.sub(r"(\{\d+,\d*\})\+", r"\1", tokenizer.pattern)
    return {
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_split(pattern), _BYTE_LEVEL]},
        "decoder": _BYTE_LEVEL,
        "model": _byte_pair_model(vocabulary, merges),
    }


def _shown(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Recover the merges of a byte-pair encoding from its ranks: the two parts of each token before its last merge.

    Raises:
        ValueError: a token that is not the merge of two others.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda entry: entry[1]):
        if len(token) > 1:
            parts = _parts(token, rank, ranks)
            if len(parts) != 2:
                raise ValueError(
                    f"the tokenizer has {token!r}, which is no merge of two tokens, as a tokenizer.json needs; export "
                    "with --no-tokenizer"
                )
            found.append((parts[0], parts[1]))
    return found


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge a token's bytes by all merges that come before its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        first, i = min((ranks.get(left + right, rank), i) for i, (left, right) in enumerate(pairwise(parts)))
        if first >= rank:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
