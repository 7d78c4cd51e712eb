"""Tensors that processes have in parts: the `DTensor`s that FSDP2's `fully_shard` makes of parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_part(tensor: Any) -> bool:
    """Whether processes have the tensor in parts."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """All of a tensor that processes may have in parts. All have to ask."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def like(tensor: Tensor, parameter: Any) -> Tensor:
    """A whole tensor, in the parts that a parameter of its shape has."""
    if not is_part(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
