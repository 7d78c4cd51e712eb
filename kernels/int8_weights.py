"""Weights as 8-bit integers with a scale for each row: a quarter of float32's memory, half of bfloat16's."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LARGEST = 127  # -128 has no opposite, and is not used


@torch.no_grad()
def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of a matrix to multiples of its largest magnitude over 127: weight is about q * scale[:, None].

    Symmetric absmax quantisation of each output (Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, section 2.1, by
    rows of the weight), to the nearest integer, ties to even. So |weight - q * scale[:, None]| is at most scale / 2,
    but for the rounding of float32.

    Args:
        weight: [N, K] float32, float16, bfloat16 or float64, as in `nn.Linear(K, N)`.

    Returns:
        q [N, K] int8, from -127 to 127, and scale [N] float32. Rows of zeros have the scale 1, as have rows so small
        that their scale would not be a normal number of float32: these become zeros.

    Raises:
        TypeError: what is no tensor, or in another dtype.
        ValueError: a weight that is not [N, K] with N and K >= 1, or holds a number that is not finite in float32.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize_int8: weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"quantize_int8: weight must be float32, float16, bfloat16 or float64, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"quantize_int8: weight must be [N, K] with N and K of at least 1, got shape {tuple(weight.shape)}"
        )
    low, high = torch.aminmax(weight, dim=1)  # [N] each; NaN where a row holds one
    largest = torch.maximum(-low, high).float()
    if not weight.is_meta and not largest.isfinite().all():
        row = int(largest.isfinite().logical_not().nonzero()[0])
        raise ValueError(f"quantize_int8: weight must be finite in float32, got NaN or infinity in row {row}")
    scale = largest / _LARGEST
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 1.0, scale)  # [N]
    quotients = weight / scale[:, None]  # [N, K], in float32 at least
    # a quotient may exceed 127 by the rounding of the scale
    return quotients.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale
