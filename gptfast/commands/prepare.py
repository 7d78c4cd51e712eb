"""The command `gptfast prepare`: tokenize text into a folder of token shards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptfast import tokenizers
from gptfast.checkpoint.atomic_files import require_unused
from gptfast.data import documents, shards
from gptfast.data import prepare as engine


@dataclass
class PrepareConfig:
    """Tokenize text into a folder of token shards, which `gptfast train --data` reads."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """stdlib, shakespeare, chatbot, clinic, sentences, a text or JSON-lines file (.gz is decompressed), a folder of
    such files, or a glob pattern."""
    out: str
    """Folder to write; it must not exist or be empty."""
    tokenizer: str = "gpt2"
    """char, byte, word, or the name of a tiktoken encoding such as gpt2."""
    vocabulary: str | None = None
    """Folder with the files of a tiktoken encoding, for machines without a network."""
    field: str = "text"
    """Field with the text of a document in a JSON line."""
    held_out: float | None = None
    """Share held out for validation. A single text holds out its end, by default 0.1. Many documents hold out random
    ones, by default 0.005, and always the second."""
    workers: int = 0
    """Tokenizer processes; 0 starts one per CPU."""
    shard_tokens: int = shards.SHARD_TOKENS
    """Tokens per shard file."""
    seed: int = 1337
    """Seed for the choice of held-out documents."""

    def __post_init__(self) -> None:
        if self.held_out is not None and not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, got {self.shard_tokens}")


def run(config: PrepareConfig) -> None:
    """Prepare the data, then print a summary and the next command."""
    index = prepare(config)
    for split, written in index["splits"].items():
        per_token = written["text_bytes"] / written["tokens"]
        contents = f"documents: {written['documents']:,}, files: {len(written['shards'])}"
        print(f"{split}: {written['tokens']:,} tokens, {per_token:.2f} bytes of text each; {contents}")
    print(f"vocabulary {index['vocab_size']:,}, {index['dtype']}, in {config.out}")
    print(f"gptfast train PRESET --data {config.out}")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the folder and return its index; see `gptfast.data.shards`.

    Raises:
        ValueError: an unusable source, tokenizer or output folder.
        OSError: the folder cannot be written.
    """
    out = Path(config.out)
    require_unused(out)  # before the tokenizer reads every document
    source = documents.open_source(config.source, config.field)
    tokenizer = tokenizers.for_documents(
        config.tokenizer, source.documents(), end_of_text=not source.one_document, vocabulary=config.vocabulary
    )
    return engine.prepare(source, tokenizer, out, config.held_out, config.workers, config.shard_tokens, config.seed)
