"""Run folder: what training writes and generation reads.

    config.json           settings of the run
    tokenizer.json        tokenizer
    model.safetensors     weights with the lowest validation loss so far
    adapters.safetensors  adapters of a LoRA run
    checkpoints/          the last checkpoints, see `gptfast.checkpoint.manager`
    log.jsonl             one JSON object per line: losses, learning rate, speed, samples
    summary.json, loss.png    results, written when training ends
    failed-step.json, failed-batch.safetensors    step and batch of a loss that is not finite

All files but the log appear whole or not at all: they are written beside their place and renamed into it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptfast import tokenizers
from gptfast.checkpoint import vocab_padding
from gptfast.checkpoint.atomic_files import read_json, read_tensors, replace_file, write_json, write_tensors
from gptfast.config import GPTConfig
from gptfast.tokenizers import Tokenizer


class RunFolder:
    """Exclusive writer of a run folder. As a context manager it removes a new run that an error ends before its log.

    Args:
        path: a path that does not exist, an empty folder, or with `resume` a run.
        resume: continue the run at `path`, if there is one.

    Raises:
        ValueError: the folder is not empty, another process trains there, or it cannot be written.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.resumed = resume and is_run(path)
            if not self.resumed:
                _require_unused(path, resume)
            self._lock = _lock(path / ".lock")
        except OSError as error:
            raise ValueError(f"cannot create the run folder {path}: {error.strerror}") from error
        if not self.resumed:
            try:
                _require_unused(path, resume)  # another process may have trained there before it released the lock
            except ValueError:
                self.close()
                raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.close()
        if error is not None and not self.resumed and not (self.path / "log.jsonl").exists():
            shutil.rmtree(self.path, ignore_errors=True)  # an error here would hide the one that ended the block

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, replacing an older one."""
        write_json(self.path / name, content)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file, replacing an older one."""
        write_tensors(self.path / name, tensors)

    def append_log(self, entry: Mapping[str, Any]) -> None:
        """Append a line to the log."""
        line = json.dumps(entry, allow_nan=False) + "\n"
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(line)

    def truncate_log(self, step: int) -> None:
        """Drop the log's entries of steps after `step`, which a resumed run takes again."""
        path = self.path / "log.jsonl"
        if path.exists():
            kept = "".join(json.dumps(entry) + "\n" for entry in read_log(self.path) if entry["step"] <= step)
            replace_file(path, lambda partial: partial.write_text(kept, encoding="utf-8"))


def _require_unused(path: Path, resume: bool) -> None:
    # a process that was killed before its first write leaves these
    if any(file.name != ".lock" and file.suffix != ".partial" for file in path.iterdir()):
        advice = "it holds no run to continue" if resume else "give a new one with --out, or continue it with --resume"
        raise ValueError(f"the run folder {path} is not empty; {advice}")


def _lock(path: Path) -> int:
    """Lock a file and return its descriptor. The lock ends with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ValueError(
            f"another process trains in the run folder {path.parent}; wait for it, or give another folder"
        ) from error
    return descriptor


def is_run(path: Path) -> bool:
    """True if a folder holds a run. Folders in Hugging Face's layout have files of the same names."""
    return all((path / name).is_file() for name in ("config.json", "tokenizer.json")) and not is_hugging_face(path)


def is_hugging_face(path: Path) -> bool:
    """True if a folder holds a model in Hugging Face's layout, of any architecture."""
    try:
        return "model_type" in read_json(path / "config.json")
    except (OSError, ValueError):
        return False


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the entries of a run's log, without a last line that a killed process left unfinished."""
    entries = []
    for line in (path / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def read_config(path: Path) -> tuple[dict[str, Any], GPTConfig]:
    """Read the settings of a run and the shape of its model.

    Raises:
        ValueError: they are missing or damaged.
    """
    settings = read_json(path / "config.json")
    try:
        return settings, GPTConfig(**settings.get("model", {}))
    except TypeError as error:
        raise ValueError(f"{path / 'config.json'} holds no model settings: {error}") from error


def read_model(path: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    """Read the shape, the weights and the tokenizer of a run's model. Tensors' shapes are not checked.

    Raises:
        ValueError: no run folder, or a file that is missing or damaged.
    """
    if is_hugging_face(path):
        raise ValueError(f"{path} is not a run folder: its config.json is that of a model in Hugging Face's layout")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a run folder with weights: it has no {name}")
    tokenizer = tokenizers.from_json(read_json(path / "tokenizer.json"))
    _, config = read_config(path)
    saved = read_tensors(path / "model.safetensors")
    weights = {name: vocab_padding.unpad(config, name, tensor) for name, tensor in saved.items()}
    if config.tie_weights and vocab_padding.EMBEDDING in weights:
        weights[vocab_padding.HEAD] = weights[vocab_padding.EMBEDDING]
    return config, weights, tokenizer
