"""Products with a fixed weight on CPUs, by oneDNN, its layout chosen once: what decoding reads for every token.

`F.linear` of one row reads its weight at half the speed of the memory or less; oneDNN in float32 at nearly that speed
as the weight is, in bfloat16 only with its blocks side by side. An activation is applied to the accumulated sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.pytorch_internals import onednn_linear, onednn_reorder_weight, onednn_supports_bfloat16

# activation -> oneDNN's name and algorithm
_POST = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


def can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies with this weight [N, K] in `dtype`: float32 or bfloat16, on a CPU that has it."""
    if type(weight.detach()) is not Tensor or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return onednn_supports_bfloat16()
    return dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """The weight [N, K] as `packed_linear` reads it fastest for few rows: itself in float32, else a copy of its size.

    The copy is opaque: only `packed_linear` takes it.
    """
    weight = weight.detach()
    return weight.contiguous() if weight.dtype == torch.float32 else onednn_reorder_weight(weight, 1)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """activation(x @ weight.T + bias), without a derivative.

    Args:
        x: [..., K], of the weight's dtype.
        weight: [N, K], from `pack`.
        bias: [N] or None.
        activation: None, "gelu" (of the normal distribution's integral), "gelu_tanh" or "relu".

    Returns:
        [..., N].
    """
    name, algorithm = _POST[activation]
    return onednn_linear(x, weight, bias, name, [], algorithm)
