"""What only attention promises: causality, and where its result lies."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import reference
from oracle import DEVICE, assert_equal_to_oracle


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(3)]


def test_the_future_is_not_seen():
    """Other keys and values after position t leave the rows up to t bitwise alone."""
    q, k, v = qkv(1, 2, 150, 32)
    before = kernels.causal_attention(q, k, v)
    k[:, :, 97:], v[:, :, 97:] = 100.0, 1e30
    after = kernels.causal_attention(q, k, v)
    assert torch.equal(after[:, :, :97], before[:, :, :97])
    assert (after[:, :, 97:] - before[:, :, 97:]).abs().min() > 0


def test_fewer_queries_than_keys_are_the_last_ones():
    q, k, v = qkv(1, 2, 100, 32)
    whole = kernels.causal_attention(q, k, v)
    torch.testing.assert_close(kernels.causal_attention(q[:, :, 63:], k, v), whole[:, :, 63:])


def test_the_result_lies_as_the_output_projection_reads_it():
    o = kernels.causal_attention(*qkv(2, 3, 5, 16))
    assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1e3])
def test_scores_of_extreme_size(magnitude: float):
    """All equal, nearly equal, and one that dominates."""
    q, k, v = qkv(1, 1, 70, 16)
    q, k = q * magnitude, k * magnitude
    y = kernels.causal_attention(q, k, v)
    exact = reference.causal_attention(q.double(), k.double(), v.double())
    assert_equal_to_oracle("result", y, reference.causal_attention(q, k, v), exact)
