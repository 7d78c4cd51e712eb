"""A run folder: what training writes and generation reads.

    config.json        the settings of the run
    tokenizer.json     the tokenizer
    model.safetensors  the weights with the lowest validation loss so far
    log.jsonl          one JSON object per line: losses, learning rate, speed
    summary.json       the outcome; there when training has ended

Files other than the log appear whole or not at all: they are written beside their place and renamed into it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from gptfast import tokenizers
from gptfast.backend import Request
from gptfast.config import GPTConfig
from gptfast.files import read_json, read_tensors
from gptfast.model import GPT


class RunFolder:
    """Writes a new run folder. As a context manager it removes a folder that failed before anything was logged.

    Args:
        path: of the folder, which must not exist yet or be empty.

    Raises:
        ValueError: the path is taken, or cannot be created.
    """

    def __init__(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
            taken = any(path.iterdir())
        except OSError as error:
            raise ValueError(f"cannot create the run folder {path}: {error.strerror}") from error
        if taken:
            raise ValueError(f"the run folder {path} is not empty; give a new one with --out")
        self.path = path

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None and not (self.path / "log.jsonl").exists():
            shutil.rmtree(self.path, ignore_errors=True)  # the error tells more than what a full disk may add to it

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file, replacing an older one."""
        self._write(name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def append_log(self, entry: dict[str, Any]) -> None:
        """Add a line to the log."""
        line = json.dumps(entry, allow_nan=False) + "\n"
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(line)

    def save_weights(self, model: GPT) -> None:
        """Write the weights, replacing older ones. Tied ones are stored once, by the name of the embedding."""
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_weights:
            del weights["lm_head.weight"]
        self._write("model.safetensors", safetensors.torch.save(weights, metadata={"format": "pt"}))

    def _write(self, name: str, content: bytes) -> None:
        partial = self.path / (name + ".partial")
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path / name)


def load(path: Path, device: torch.device, backend: Request = "auto") -> tuple[GPT, tokenizers.Tokenizer]:
    """The model and the tokenizer of a run folder.

    Raises:
        ValueError: not a run folder, a file that is missing or damaged, or weights that do not fit the settings.
    """
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(f"{path} is not a run folder with weights: it has no {name}")
    tokenizer = tokenizers.from_json(read_json(path / "tokenizer.json"))
    settings = read_json(path / "config.json")
    try:
        config = GPTConfig(**settings.get("model", {}))
    except TypeError as error:
        raise ValueError(f"{path / 'config.json'} holds no model settings: {error}") from error
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"{path / 'tokenizer.json'} does not fit config.json: it has {tokenizer.vocab_size} tokens, "
            f"the model {config.vocab_size}"
        )
    model = GPT(config, backend="eager")
    weights = read_tensors(path / "model.safetensors")
    if config.tie_weights and "transformer.wte.weight" in weights:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path / 'model.safetensors'} does not fit config.json: {_one_line(error)}") from error
    model.to(device).set_backend(backend)
    return model, tokenizer


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
