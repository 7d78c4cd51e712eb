"""Files that appear whole or not at all, with damage detected: JSON, and tensors with a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_CHECKSUM = "sha256"  # key in the metadata of a safetensors file


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: a JSON object is needed")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, by name.

    Raises:
        ValueError: another format, or tensors that differ from the checksum of `write_tensors`.
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
        raise ValueError(f"{path} is damaged: its checksum does not match")
    return tensors


def require_fit(problem: str, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check tensors of a file, of any 16 or 32-bit float, against those of a model.

    Args:
        problem: beginning of the error message.
        tensors: the file's, by name.
        expected: the model's `state_dict`; may be on the meta device.

    Raises:
        ValueError: a tensor is missing, unknown, misshapen or of another dtype; the message names the first one.
    """
    for name, model_tensor in expected.items():
        shape = list(model_tensor.shape)
        if name not in tensors:
            raise ValueError(f"{problem}: it lacks tensor {name} {shape}")
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            raise ValueError(f"{problem}: tensor {name} is {list(tensor.shape)}, {shape} is expected")
        if tensor.dtype not in _FLOATS:
            given, *accepted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *_FLOATS))
            raise ValueError(f"{problem}: tensor {name} is of dtype {given}; accepted: {', '.join(accepted)}")
    unknown = next((name for name in tensors if name not in expected), None)
    if unknown is not None:
        raise ValueError(f"{problem}: tensor {unknown} is none of the model's")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, replacing an older one. Raises OSError if the disk is full or not writable."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write CPU tensors as safetensors with a checksum. Replaces and raises as `write_json`."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _CHECKSUM: checksum(contiguous)}

    def write(partial: Path) -> None:
        partial.touch()
        mode = partial.stat().st_mode
        safetensors.torch.save_file(contiguous, partial, metadata)
        partial.chmod(mode)  # safetensors makes it private

    replace_file(path, write)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file beside `path`, flush it to the disk and rename it into place."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps OSError in SafetensorError
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of CPU tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_unused(path: Path) -> None:
    """Raise ValueError unless `path` is free: it does not exist or is an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is not empty; give a new folder")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write into, which appears at `path` when the block ends without an error.

    Raises:
        ValueError: `path` is a file or a folder that is not empty.
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
            path.rmdir()  # fails if another process has written there since
        os.rename(partial, path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync_folder(path: Path) -> None:
    """Flush the names in a folder to the disk. Without it a power cut may lose the name of a flushed file."""
    if os.name == "posix":  # other systems cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
