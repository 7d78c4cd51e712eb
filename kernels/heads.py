"""What the host code of all attention shares: which heads it takes, how they are padded, laid out and scaled."""

from __future__ import annotations

from torch import Tensor

from kernels import runtime

LOG2_E = 1.4426950408889634  # scores are kept in units of log2


def require_heads(operator: str, x: Tensor) -> None:
    """Raise TypeError or ValueError unless the kernels take heads x [..., D]."""
    runtime.require_dtype(operator, x)
    if x.shape[-1] > runtime.MAX_HEAD_SIZE:
        raise ValueError(f"{operator}: the head size D must be at most {runtime.MAX_HEAD_SIZE}, got {x.shape[-1]}")


def padded(head_size: int) -> int:
    """The width of a tile of heads: a power of two that matrix units take."""
    return max(16, runtime.next_power_of_2(head_size))


def unit_stride(x: Tensor) -> Tensor:
    """Return x with adjacent elements in its last dimension; a copy only where that is not so already."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def scale_or_default(scale: float | None, head_size: int) -> float:
    return head_size**-0.5 if scale is None else float(scale)
