"""What only attention promises: causality, and a dropout whose mask is a function of the seed."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import reference
from oracle import DEVICE, assert_equal_to_oracle


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(3)]


def dropout_mask(batch: int, heads: int, length: int, p: float, seed: int) -> torch.Tensor:
    """The mask [B, H, T, T] of kept probabilities, read off a run whose values are the identity matrix."""
    q, k, _ = qkv(batch, heads, length, length)
    identity = torch.eye(length, device=DEVICE).expand(batch, heads, length, length)
    return kernels.causal_attention(q, k, identity, dropout_p=p, seed=seed) != 0


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_equals_the_reference_with_the_same_mask(dtype: torch.dtype):
    p, length = 0.3, 80
    kept = dropout_mask(2, 2, length, p, seed=5)
    inputs = qkv(2, 2, length, length, dtype=dtype, seed=1)
    do, _, _ = qkv(2, 2, length, length, dtype=dtype, seed=2)

    def run(function, precision):
        tensors = [x.detach().to(precision).requires_grad_() for x in inputs]
        o = function(*tensors)
        o.backward(do.to(precision))
        return [o.detach(), *(x.grad for x in tensors)]

    ours = run(lambda q, k, v: kernels.causal_attention(q, k, v, dropout_p=p, seed=5), dtype)
    theirs = run(lambda q, k, v: reference.attention_with_mask(q, k, v, None, p, kept), dtype)
    exact = run(lambda q, k, v: reference.attention_with_mask(q, k, v, None, p, kept), torch.float64)
    for name, *results in zip(("result", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert_equal_to_oracle(name, *results)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_right_share(p: float):
    kept = dropout_mask(2, 2, 128, p, seed=3)
    past = reference.causal_mask(128, 128, DEVICE).expand_as(kept)
    drawn = int(past.sum())
    share = kept[past].float().mean().item()
    # four standard deviations of a binomial share
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / drawn) ** 0.5
    assert not kept[~past].any()


def test_the_seed_makes_the_mask():
    first = dropout_mask(1, 2, 64, 0.5, seed=3)
    assert torch.equal(first, dropout_mask(1, 2, 64, 0.5, seed=torch.tensor([3], device=DEVICE)))
    assert not torch.equal(first, dropout_mask(1, 2, 64, 0.5, seed=4))
    assert not torch.equal(first[:, 0], first[:, 1]), "heads share a mask"


def test_without_a_seed_the_mask_comes_from_the_global_generator():
    q, k, v = qkv(1, 1, 64, 16)
    torch.manual_seed(0)
    first, second = (kernels.causal_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    again = kernels.causal_attention(q, k, v, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_the_reference_repeats_its_dropout_with_a_seed():
    q, k, v = qkv(1, 1, 64, 16)
    first, second, other = (reference.causal_attention(q, k, v, dropout_p=0.5, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
