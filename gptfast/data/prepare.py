"""Tokenize documents into shards, in parallel and in bounded memory."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gptfast import tokenizers
from gptfast.checkpoint.atomic_files import new_folder, write_json
from gptfast.data import shards
from gptfast.data.documents import Piece, Source
from gptfast.tokenizers import Tokenizer

_BATCH = 2**20  # minimum characters that a worker tokenizes at a time
_BYTES_PER_WORKER = 2**23  # a process takes seconds to start


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out: Path,
    held_out: float | None = None,
    workers: int = 0,
    shard_tokens: int = shards.SHARD_TOKENS,
    seed: int = 1337,
) -> dict[str, Any]:
    """Write token shards, the tokenizer and an index into a new folder, which appears whole or not at all.

    Args:
        source: the documents.
        tokenizer: an end-of-text token, if it has one, follows each document.
        out: the folder; it must not exist or be empty.
        held_out: share held out for validation: the end of a single text (default 0.1), or random documents and always
            the second one (default 0.005).
        workers: processes that tokenize; 0 starts one per processor.
        shard_tokens: tokens per shard file.
        seed: seed of the choice of held-out documents.

    Returns:
        The index, see `gptfast.data.shards`.

    Raises:
        ValueError: a document cannot be read or tokenized, or a split is left without tokens.
        OSError: the folder cannot be written.
    """
    with new_folder(out) as folder:
        splits = _write(split_pieces(source, held_out, seed), source.bytes, tokenizer, folder, workers, shard_tokens)
        for split, written in splits.items():
            if written["tokens"] == 0:
                raise ValueError(f"the text leaves no tokens for {split}; give more text, or another --held-out")
        write_json(folder / "tokenizer.json", tokenizer.to_json())
        shards.write_index(folder, tokenizer.vocab_size, shards.dtype_for(tokenizer.vocab_size), splits)
        return shards.read_index(folder)


def _write(
    parts: Iterable[Part], size: int, tokenizer: Tokenizer, folder: Path, workers: int, shard_tokens: int
) -> dict[str, dict[str, Any]]:
    """Tokenize `size` bytes of documents into shards, and return the index's entry of each split."""
    dtype = shards.dtype_for(tokenizer.vocab_size)
    writers = {split: shards.SplitWriter(folder, split, dtype, shard_tokens) for split in shards.SPLITS}
    workers = min(workers or os.cpu_count() or 1, 1 + size // _BYTES_PER_WORKER)
    with tqdm(total=size, unit="B", unit_scale=True, dynamic_ncols=True, disable=None) as bar:
        for part, ids in tokenized(parts, tokenizer, workers):
            writer = writers[part.split]
            writer.append(ids)
            writer.text_bytes += len(part.piece.text.encode("utf-8", "surrogatepass"))
            if part.piece.last:
                writer.documents += 1
                if tokenizer.end_of_text is not None:
                    writer.append(np.array([tokenizer.end_of_text]))
            bar.update(part.piece.consumed)
    return {split: writer.close() for split, writer in writers.items()}


class Part(NamedTuple):
    """A piece of a document and its split."""

    split: str
    piece: Piece


def split_pieces(source: Source, held_out: float | None, seed: int) -> Iterator[Part]:
    """Assign the pieces of a source to training and validation."""
    if source.one_document:
        return _tail_held_out(source, held_out or 0.1)
    return _documents_held_out(source.pieces(), held_out or 0.005, seed)


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


def tokenized(parts: Iterable[Part], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[Part, np.ndarray]]:
    """Yield parts with their token ids, in order; several workers run a few batches ahead."""
    if workers == 1:
        for part in parts:
            yield part, tokenizer.encode(part.piece.text)
        return
    # a forked process would inherit PyTorch's locks without its threads
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenizer.to_json(),))
    try:
        waiting: deque[tuple[list[Part], Future[list[np.ndarray]]]] = deque()
        for batch in _batches(parts):
            waiting.append((batch, pool.submit(_encode, [part.piece.text for part in batch])))
            if len(waiting) > 2 * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Group parts into batches large enough to send to a worker."""
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
    """Initialise a worker, which exits with its parent even if that is killed."""
    global _tokenizer
    _tokenizer = tokenizers.from_json(saved)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(texts: list[str]) -> list[np.ndarray]:
    return [_tokenizer.encode(text) for text in texts]
