"""Files that appear whole or not at all, and whose damage is found: JSON, and tensors with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CHECKSUM = "sha256"  # in the metadata of a safetensors file


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: a JSON object is needed")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name.

    Raises:
        ValueError: another file, or tensors that differ from the checksum `write_tensors` left.
    """
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise OSError(f"cannot read {path}: {error}") from error
    if expected is not None and checksum(tensors) != expected:
        raise ValueError(f"{path} is damaged: its checksum is another")
    return tensors


def require_fit(problem: str, found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]) -> None:
    """Check the tensors of a file, of any float of 16 or 32 bits, against a model's.

    Args:
        problem: what the message begins with.
        found: tensors by name.
        expected: their shapes, by name.

    Raises:
        ValueError: one is missing, unknown, of another shape or dtype; the message names the first.
    """
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{problem}: it lacks tensor {name} {list(shape)}")
        tensor = found[name]
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{problem}: tensor {name} is {list(tensor.shape)}, {list(shape)} is expected")
        if tensor.dtype not in _FLOATS:
            given, *accepted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *_FLOATS))
            raise ValueError(f"{problem}: tensor {name} is of dtype {given}; accepted: {', '.join(accepted)}")
    unknown = next((name for name in found if name not in expected), None)
    if unknown is not None:
        raise ValueError(f"{problem}: tensor {unknown} is none of the model's")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, replacing an older one."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    partial = _beside(path)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        _put_in_place(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors on the CPU as safetensors with a checksum, replacing an older file.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    partial = _beside(path)
    try:
        metadata = {"format": "pt", _CHECKSUM: checksum(contiguous)}
        partial.touch()
        mode = partial.stat().st_mode
        safetensors.torch.save_file(contiguous, partial, metadata)
        partial.chmod(mode)  # its own lets nobody else read
        _put_in_place(partial, path)
    except (OSError, SafetensorError) as error:  # the system's errors come in its own clothes
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_unused(path: Path) -> None:
    """Raise ValueError unless a new folder may have this path: there is none, or an empty one."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is not empty; give a new folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that appears at `path` with all its files, or not at all where an error ends the block.

    Raises:
        ValueError: there is something already.
        OSError: the folder cannot be written.
    """
    require_unused(path)
    path = path.absolute()
    partial = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_folder(partial)
        if path.exists():
            path.rmdir()  # empty, or somebody else was faster
        os.rename(partial, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync_folder(path: Path) -> None:
    """Have the disk know the names in a folder: without it a file may be there and its name not, after a power cut."""
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _put_in_place(partial: Path, path: Path) -> None:
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
