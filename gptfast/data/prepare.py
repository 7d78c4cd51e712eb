"""`gptfast prepare`: documents to token shards, in parallel, within a bounded memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from gptfast import tokenizers
from gptfast.checkpoint.atomic_files import new_folder, require_unused
from gptfast.data import documents, shards
from gptfast.data.documents import Piece, Source
from gptfast.tokenizers import Tokenizer

_BATCH = 2**20  # characters that a worker gets at a time, at least
_WORTH_A_PROCESS = 2**23  # bytes


@dataclass
class PrepareConfig:
    """Tokenize texts into a folder of token shards, which `gptfast train --data` takes."""

    source: tyro.conf.Positional[str]
    """stdlib, shakespeare, chatbot, clinic, sentences, a text or JSON-lines file (.gz is unpacked), a folder of such
    files, or a pattern."""
    out: str
    """Folder to write, which must be new."""
    tokenizer: str = "gpt2"
    """char, byte, word, or the name of a tiktoken encoding such as gpt2."""
    vocabulary: str | None = None
    """Folder with the files of a tiktoken encoding, for machines without a network."""
    field: str = "text"
    """Field of JSON lines that holds a document's text."""
    held_out: float | None = None
    """Share that validation uses: the end of a single text, by default 0.1 of it; of many documents some that are drawn
    at random, by default 0.005 of them, and always the second."""
    workers: int = 0
    """Processes that tokenize; 0 is one for each processor."""
    shard_tokens: int = shards.SHARD_TOKENS
    """Tokens of a file."""
    seed: int = 1337
    """Of the draw of held-out documents."""

    def __post_init__(self) -> None:
        if self.held_out is not None and not 0.0 < self.held_out < 1.0:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, got {self.shard_tokens}")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the shards, the tokenizer and the index; the folder appears whole or not at all.

    Returns:
        What `index.json` holds, see `gptfast.data.shards`.

    Raises:
        ValueError: a source, tokenizer or folder that does not do; the message names it.
    """
    out = Path(config.out)
    require_unused(out)
    source = documents.source(config.source, config.field)
    tokenizer = tokenizers.for_documents(
        config.tokenizer, source.documents(), end_of_text=not source.one_document, vocabulary=config.vocabulary
    )
    with new_folder(out) as partial:
        return _write(config, source, tokenizer, partial)


def _write(config: PrepareConfig, source: Source, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    dtype = shards.dtype_for(tokenizer.vocab_size)
    writers = {split: shards.SplitWriter(folder, split, dtype, config.shard_tokens) for split in shards.SPLITS}
    size = source.bytes
    # a process takes seconds to start
    workers = min(config.workers or os.cpu_count() or 1, 1 + size // _WORTH_A_PROCESS)
    with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        for part, ids in tokenized(divided(source, config), tokenizer, workers):
            writer = writers[part.split]
            writer.append(ids)
            writer.text_bytes += _bytes(part.piece.text)
            if part.piece.last:
                writer.documents += 1
                if tokenizer.end_of_text is not None:
                    writer.append(np.array([tokenizer.end_of_text]))
            bar.update(part.piece.consumed)
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, written in splits.items():
        if written["tokens"] == 0:
            raise ValueError(f"{config.source} leaves no tokens for {split}; give more text, or another --held-out")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer.to_json()), encoding="utf-8")
    shards.write_index(folder, tokenizer.vocab_size, dtype, splits)
    return shards.read_index(folder)


class Part(NamedTuple):
    """A piece of a document, and the split that it belongs to."""

    split: str
    piece: Piece


def divided(source: Source, config: PrepareConfig) -> Iterator[Part]:
    """The pieces of a source, some of them held out for validation."""
    if source.one_document:
        return _tail_held_out(source, config.held_out or 0.1)
    return _documents_held_out(source.pieces(), config.held_out or 0.005, config.seed)


def _tail_held_out(source: Source, share: float) -> Iterator[Part]:
    total = sum(len(text) for text in source.documents())
    left = int(total * (1.0 - share))  # characters to train on
    for piece in source.pieces():
        training, held_out = piece.text[:left], piece.text[left:]
        if training:
            yield Part("train", replace(piece, text=training, last=left <= len(piece.text)))
        if held_out or piece.last:
            yield Part("val", replace(piece, text=held_out, consumed=0 if training else piece.consumed))
        left -= len(training)


def _documents_held_out(pieces: Iterator[Piece], share: float, seed: int) -> Iterator[Part]:
    draw = random.Random(seed)
    number, held_out = 0, draw.random() < share
    for piece in pieces:
        yield Part("val" if held_out or number == 1 else "train", piece)
        if piece.last:
            number, held_out = number + 1, draw.random() < share


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def tokenized(parts: Iterable[Part], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Part, np.ndarray]]:
    """Parts and their token ids, in order. With `workers` above 1 other processes tokenize, some batches ahead."""
    if workers == 1:
        for part in parts:
            yield part, tokenizer.encode(part.piece.text)
        return
    batches = _batches(iter(parts))
    # forked processes would inherit PyTorch's locks without its threads
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenizer.to_json(),))
    try:
        waiting: deque[tuple[list[Part], Future[list[np.ndarray]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_encode, [part.piece.text for part in batch])))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
    """Parts in groups that are worth a worker's while."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.piece.text)
        if size >= _BATCH or len(batch) >= 1000:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_tokenizer: Tokenizer


def _start(saved: dict[str, Any]) -> None:
    """Make this process a worker, which ends when its parent does, however that ends."""
    global _tokenizer
    _tokenizer = tokenizers.from_json(saved)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [_tokenizer.encode(text) for text in texts]


def describe(index: dict[str, Any], out: str) -> str:
    """The outcome in a few lines for people."""
    lines = []
    for split, written in index["splits"].items():
        per_token = written["text_bytes"] / written["tokens"]
        lines.append(
            f"{split}: {written['tokens']:,} tokens, {per_token:.2f} bytes of text each; documents: "
            f"{written['documents']:,}, files: {len(written['shards'])}"
        )
    return "\n".join([*lines, f"vocabulary {index['vocab_size']:,}, {index['dtype']}, in {out}"])
