"""Tensor descriptors for TMA: the memory system copies whole tiles between global and shared memory."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tile

_ALIGNMENT = 16  # bytes, of the first element and of every stride but the last


def has_tma(architecture: str) -> bool:
    """Return True for NVIDIA GPUs from Hopper on, and for Triton's interpreter ("none"), which emulates TMA."""
    return architecture.startswith(("sm_9", "sm_10", "sm_12", "none"))


def supports_tma(*tensors: Tensor) -> bool:
    """Return True if all tensors are in half precision with a last stride of 1 and aligned in other dimensions."""
    for tensor in tensors:
        if tensor.dtype == torch.float32 or tensor.data_ptr() % _ALIGNMENT != 0 or tensor.stride(-1) != 1:
            return False
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size != 1 and (stride == 0 or stride * tensor.itemsize % _ALIGNMENT != 0):
                return False
    # the interpreter is wrong on bfloat16
    return not (tile.INTERPRETED.value and tensors[0].dtype == torch.bfloat16)


def make_descriptor(tensor: Tensor | None, *block: int) -> TensorDescriptor | None:
    """Return a descriptor of `tensor` for tiles of shape `block`."""
    if tensor is None:
        return None
    # a dimension of size 1 may have any stride
    strides = [stride if size != 1 else _ALIGNMENT for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], list(block))
