"""Token shards: memory-mapped files of token ids, with an index.

    index.json         format, vocabulary size, dtype; documents, bytes of text and shards of each split
    tokenizer.json     tokenizer
    train-00000.bin    token ids, little-endian uint16 or uint32
    val-00000.bin

nanoGPT's folders, with a train.bin and a val.bin in uint16, can be read too.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from gptfast.checkpoint.atomic_files import read_json, write_json

FORMAT = 1
SPLITS = ("train", "val")
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SHARD_TOKENS = 2**27


def dtype_for(vocab_size: int) -> str:
    """Return the narrowest dtype for the ids of a vocabulary."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class Tokens:
    """Token ids of a split, concatenated over its shards and read on access.

    Args:
        shards: [N_i] arrays of unsigned integers.
    """

    def __init__(self, shards: list[np.ndarray]) -> None:
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return sum(map(len, self._shards))

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Read `length` ids from each of `starts` [B], as int64 [B, length]. All windows must lie within the split."""
        found = np.empty((len(starts), length), dtype=np.int64)
        for row, start in enumerate(starts.tolist()):
            index = int(np.searchsorted(self._ends, start, side="right"))
            filled = 0
            while filled < length:
                offset = start + filled - int(self._ends[index]) + len(self._shards[index])
                part = self._shards[index][offset : offset + length - filled]
                found[row, filled : filled + len(part)] = part
                filled += len(part)
                index += 1
        return found


class SplitWriter:
    """Writer of the shards of a split.

    Args:
        folder: output folder.
        split: name of the split.
        dtype: "uint16" or "uint32".
        shard_tokens: ids per shard.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, DTYPES[dtype], shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self.tokens = self.documents = self.text_bytes = 0

    def append(self, ids: np.ndarray) -> None:
        """Append ids [N]."""
        ids = ids.astype(self._dtype)
        self.tokens += len(ids)
        while len(ids):
            if self._file is None:
                name = f"{self._split}-{len(self._shards):05d}.bin"
                self._file, self._digest = (self._folder / name).open("wb"), hashlib.sha256()
                self._shards.append({"file": name, "tokens": 0})
            room = self._shard_tokens - self._shards[-1]["tokens"]
            part, ids = ids[:room], ids[room:]
            content = part.tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._shards[-1]["tokens"] += len(part)
            if len(part) == room:
                self._finish()

    def _finish(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
            self._shards[-1]["sha256"] = self._digest.hexdigest()

    def close(self) -> dict[str, Any]:
        """Finish the last shard and return the split's entry of the index."""
        self._finish()
        counts = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        return {**counts, "shards": self._shards}


def write_index(folder: Path, vocab_size: int, dtype: str, splits: dict[str, dict[str, Any]]) -> None:
    """Write index.json, the last file of a folder."""
    content = {"format": FORMAT, "vocab_size": vocab_size, "dtype": dtype, "splits": splits}
    write_json(folder / "index.json", content)


def is_prepared(folder: Path) -> bool:
    """True if a folder holds token shards, of this package or of nanoGPT."""
    return (folder / "index.json").is_file() or all((folder / f"{split}.bin").is_file() for split in SPLITS)


def open_split(folder: Path, split: str) -> Tokens:
    """Map the tokens of a split into memory.

    Raises:
        ValueError: no token shards, or shards that do not match the index.
    """
    if not (folder / "index.json").is_file():
        path = folder / f"{split}.bin"
        if not path.is_file():
            raise ValueError(f"{folder} holds no token shards: it has neither an index.json nor a {path.name}")
        return Tokens([_map(path, DTYPES["uint16"], None)])
    index = read_index(folder)
    dtype = DTYPES[index["dtype"]]
    return Tokens([_map(folder / one["file"], dtype, one["tokens"]) for one in index["splits"][split]["shards"]])


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a folder.

    Raises:
        ValueError: no index, or one of another format.
    """
    path = folder / "index.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no token shards with an index: it has no index.json")
    index = read_json(path)
    if index.get("format") != FORMAT or index.get("dtype") not in DTYPES or set(index.get("splits", ())) != set(SPLITS):
        raise ValueError(f"{path} is no index of token shards in format {FORMAT}; prepare the data again")
    return index


def verify(folder: Path) -> None:
    """Compare every shard with its checksum.

    Raises:
        ValueError: a damaged shard.
    """
    for split in read_index(folder)["splits"].values():
        for shard in split["shards"]:
            with open(folder / shard["file"], "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise ValueError(f"{folder / shard['file']} is damaged: its checksum does not match; prepare again")


def _map(path: Path, dtype: np.dtype, tokens: int | None) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"{path} is missing; prepare the data again")
    size = path.stat().st_size
    if size % dtype.itemsize != 0 or (tokens is not None and size != tokens * dtype.itemsize):
        expected = "a multiple of 2 bytes is" if tokens is None else f"{tokens * dtype.itemsize} bytes are"
        raise ValueError(f"{path} is damaged: it has {size} bytes, {expected} needed; prepare the data again")
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype=dtype)
