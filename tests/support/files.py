"""Tensors of every kind, and failures of a disk."""

import math
from pathlib import Path

import torch

TENSORS = {
    "float32": torch.tensor([[0.1, -0.0], [math.inf, math.nan]]),
    "bfloat16": torch.arange(5, dtype=torch.bfloat16) / 3,
    "float16": torch.tensor([6e-8], dtype=torch.float16),
    "float64": torch.tensor([math.pi], dtype=torch.float64),
    "int32": torch.tensor([[[-(2**31)]]], dtype=torch.int32),
    "int64": torch.tensor([2**62, -1]),
    "bool": torch.tensor([True, False, True]),
    "no dimensions": torch.tensor(3.5),
    "no elements": torch.empty(0, 5),
    "transposed": torch.arange(6.0).view(2, 3).t(),
    "every other": torch.arange(10.0)[::2],
    "a name/with. é": torch.zeros(1),
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_space(*_, **__):
    raise OSError(28, "No space left on device")
