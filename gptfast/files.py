"""Reading the files that hold a model: errors name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor


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
    """The tensors in a safetensors file, by name. Raises ValueError for another file."""
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
