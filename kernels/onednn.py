"""Linear layers on CPUs by oneDNN with prepacked weights, for decoding, which reads every weight for every token.

For one row, `F.linear` reads the weight at half the memory bandwidth or less. oneDNN comes close to the bandwidth: in
float32 with the weight as it is, in bfloat16 only with a blocked layout. The activation is applied to the accumulators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.pytorch_internals import onednn_linear, onednn_reorder_weight, onednn_supports_bfloat16

# activation -> oneDNN's elementwise operation and its algorithm
_EPILOGUES = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}


def can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Return True if oneDNN multiplies by this weight [N, K] in `dtype`: float32 or, with CPU support, bfloat16."""
    if type(weight.detach()) is not Tensor or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return onednn_supports_bfloat16()
    return dtype == torch.float32


def pack(weight: Tensor) -> Tensor:
    """Return the weight [N, K] in the layout that `packed_linear` reads fastest for few rows.

    That is the weight itself in float32, and an opaque copy of the same size in bfloat16.
    """
    weight = weight.detach()
    return weight.contiguous() if weight.dtype == torch.float32 else onednn_reorder_weight(weight, 1)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """Compute activation(x @ weight.T + bias). No derivative.

    Args:
        x: [..., K], in the dtype of the weight.
        weight: [N, K], from `pack`.
        bias: [N] or None.
        activation: None, "gelu" (erf), "gelu_tanh" or "relu".

    Returns:
        [..., N].
    """
    name, algorithm = _EPILOGUES[activation]
    return onednn_linear(x, weight, bias, name, [], algorithm)
