"""Tensor descriptors: with them a GPU's memory system copies whole tiles between global and shared memory (TMA)."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tile

_ALIGNMENT = 16  # bytes, of the first element and of all strides but the last


def on_chip(architecture: str) -> bool:
    """Whether the chip has such copies: NVIDIA's from Hopper on. Triton's interpreter, of no chip, plays them."""
    return architecture.startswith(("sm_9", "sm_10", "sm_12", "none"))


def describable(*tensors: Tensor) -> bool:
    """Whether descriptors can tell these tensors: half precision, adjacent last dimension, the others aligned."""
    for tensor in tensors:
        if tensor.dtype == torch.float32 or tensor.data_ptr() % _ALIGNMENT != 0 or tensor.stride(-1) != 1:
            return False
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size != 1 and (stride == 0 or stride * tensor.itemsize % _ALIGNMENT != 0):
                return False
    # Triton's interpreter gets bfloat16 wrong
    return not (tile.INTERPRETED.value and tensors[0].dtype == torch.bfloat16)


def describe(tensor: Tensor | None, *block: int) -> TensorDescriptor | None:
    """A descriptor of `tensor` that is read or written in tiles of `block`, one size for each dimension."""
    if tensor is None:
        return None
    # of a dimension of size 1 the stride is anything
    strides = [stride if size != 1 else _ALIGNMENT for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], list(block))
