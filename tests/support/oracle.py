"""The oracle rule: a kernel's error against float64 is at most twice the reference's, plus a few ulps."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# in units in the last place of the largest result, for rounding at other points of the arithmetic: attention's
# backward subtracts two nearly equal sums where PyTorch subtracts equal ones, and Triton's interpreter truncates to
# bfloat16 where GPUs round
ULPS = 4


def assert_equal_to_oracle(
    name: str, actual: Tensor, same_dtype: Tensor, oracle: Tensor, magnitude: float = 0.0
) -> None:
    """Fail unless |actual - oracle| <= 2 |same_dtype - oracle| + a few ulps, by the largest element.

    Args:
        name: name of the result, for the message.
        actual: result of the kernel.
        same_dtype: result of the reference on the same inputs, in the dtype of `actual`.
        oracle: result of the reference on the same inputs in float64.
        magnitude: minimum size that ulps refer to, for results in which terms of this size cancel.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} elements are not finite"
    error = (actual.double() - oracle).abs().max().item()
    reference_error = (same_dtype.double() - oracle).abs().max().item()
    slack = ULPS * torch.finfo(actual.dtype).eps * max(oracle.abs().max().item(), magnitude)
    limit = 2 * reference_error + slack
    assert error <= limit, f"{name}: error {error:.3e}, allowed {limit:.3e} (the reference's is {reference_error:.3e})"
