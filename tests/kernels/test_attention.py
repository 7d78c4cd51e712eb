"""Properties of attention that no other operator has: causality, cache lengths and memory layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import kernels
from kernels import reference
from tests.support.operators import attention, packed
from tests.support.oracle import DEVICE, assert_equal_to_oracle
from tests.support.running import assert_equal_to_reference, call, leaves


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for _ in range(3)]


def test_attention_is_causal():
    """Keys and values after position t leave the rows up to t bitwise unchanged."""
    q, k, v = qkv(1, 2, 150, 32)
    before = kernels.causal_attention(q, k, v)
    k[:, :, 97:], v[:, :, 97:] = 100.0, 1e30
    after = kernels.causal_attention(q, k, v)
    assert torch.equal(after[:, :, :97], before[:, :, :97])
    assert (after[:, :, 97:] - before[:, :, 97:]).abs().min() > 0


def test_attention_gradients_are_causal():
    """Gradients of queries up to t do not depend on later keys, and those of keys from t on not on earlier queries."""
    do, t = torch.randn(1, 2, 150, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE), 97

    def gradients(change: bool) -> list[torch.Tensor]:
        tensors = [tensor.requires_grad_() for tensor in qkv(1, 2, 150, 32)]
        upstream = do.clone()
        with torch.no_grad():
            if change:
                tensors[1][:, :, t:] = 3.0
                tensors[2][:, :, t:] = 100.0
            else:
                upstream[:, :, t:] = 0.0
        return torch.autograd.grad(kernels.causal_attention(*tensors), tensors, upstream)

    changed, cut = gradients(True), gradients(False)
    assert torch.equal(changed[0][:, :, :t], cut[0][:, :, :t])
    assert not cut[1][:, :, t:].any()
    assert not cut[2][:, :, t:].any()


BOUNDARIES = [(block + more) for block in (16, 32, 64, 128) for more in (-1, 0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("length", BOUNDARIES)
def test_attention_at_block_boundaries(length: int, dtype: torch.dtype):
    """With as many queries as keys, and with fewer."""
    for queries in (length, min(length, 15)):
        case = attention(1, 1, queries, length, 16)
        assert_equal_to_reference(case, case.inputs(dtype), case.upstream(dtype))


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 7}, {"scale": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_packed_attention_is_bitwise_the_unpacked_one(dtype: torch.dtype, options: dict):
    case = packed(2, 77, 3, 24, **options)
    (joined,) = leaves(case.inputs(dtype)).values()
    parts = [part.transpose(1, 2).detach().requires_grad_() for part in joined.unbind(2)]
    (upstream,) = case.upstream(dtype).values()
    (o,) = call(case.kernel, case, {"qkv": joined}).values()
    expected = kernels.causal_attention(*parts, **options).transpose(1, 2)
    assert torch.equal(o, expected)
    o.backward(upstream)
    expected.backward(upstream)
    assert joined.grad.is_contiguous()
    for gradient, part in zip(joined.grad.unbind(2), parts, strict=True):
        assert torch.equal(gradient.transpose(1, 2), part.grad)


@pytest.mark.parametrize("count", [1, 4])
def test_decode_attention_equals_the_last_rows_of_attention(count):
    q, k, v = qkv(3, 2, 90, 32)
    whole = kernels.causal_attention(q, k, v)
    lengths = torch.tensor([90, 41, count], device=DEVICE)
    last = torch.stack([q[i, :, n - count : n] for i, n in enumerate(lengths.tolist())])  # [B, H, T, D]
    expected = torch.stack([whole[i, :, n - count : n] for i, n in enumerate(lengths.tolist())])
    torch.testing.assert_close(kernels.decode_attention(last, k, v, lengths), expected)


def test_decode_attention_reads_no_key_past_the_length():
    q, k, v = qkv(2, 1, 50, 16)
    lengths = torch.tensor([7, 33], device=DEVICE)
    expected = kernels.decode_attention(q[:, :, :3], k, v, lengths)
    for i, length in enumerate(lengths.tolist()):
        k[i, :, length:], v[i, :, length:] = float("nan"), float("nan")
    assert torch.equal(kernels.decode_attention(q[:, :, :3], k, v, lengths), expected)


def test_decode_attention_clamps_lengths():
    q, k, v = qkv(2, 1, 50, 16)
    o = kernels.decode_attention(q[:, :, :1], k, v, torch.tensor([0, 99], device=DEVICE))
    whole = kernels.decode_attention(q[:, :, :1], k, v, torch.tensor([50, 50], device=DEVICE))
    assert not o[0].any()
    assert torch.equal(o[1], whole[1])
    o = kernels.decode_attention(q[:, :, :4], k, v, torch.tensor([2, 99], device=DEVICE))
    whole = kernels.decode_attention(q[:, :, :4], k, v, torch.tensor([50, 50], device=DEVICE))
    assert o[0].abs().amax(dim=(0, 2)).gt(0.0).tolist() == [False, False, True, True]
    assert torch.equal(o[1], whole[1])


def test_attention_saves_memory_linear_in_the_sequence():
    """The inputs, the result and a number per query, but not the scores."""

    def saved(length: int) -> int:
        sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        joined = torch.randn(1, length, 3, 2, 16, device=DEVICE, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kernels.causal_attention_qkvpacked(joined)
        return sum(sizes.values())

    assert saved(128) == 2 * saved(64) == 128 * 2 * (4 * 16 + 1)


def test_attention_output_is_contiguous_for_the_output_projection():
    o = kernels.causal_attention(*qkv(2, 3, 5, 16))
    assert o.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("magnitude", [0.0, 1e-4, 1e3])
def test_attention_with_extreme_scores(magnitude: float):
    """All equal, nearly equal, and one dominant."""
    q, k, v = qkv(1, 1, 70, 16)
    q, k = q * magnitude, k * magnitude
    y = kernels.causal_attention(q, k, v)
    exact = reference.causal_attention(q.double(), k.double(), v.double())
    assert_equal_to_oracle("result", y, reference.causal_attention(q, k, v), exact)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    gradients = torch.autograd.grad(kernels.causal_attention(*tensors), tensors, torch.randn_like(y))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("scale", [-8.0, -0.1, -0.0, 0.0, 1e-30, 8.0])
@pytest.mark.parametrize("queries", [150, 20])
def test_attention_with_any_scale(queries: int, scale: float):
    """Also negative and zero: the forward takes the maximum before it scales.

    The formula is the oracle, because PyTorch's operator returns NaN for some scales on a CPU.
    """
    q, k, v = qkv(1, 2, 150, 32)
    dy = torch.sin(torch.arange(2 * queries * 32, device=DEVICE)).view(1, 2, queries, 32)

    def results(attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        arguments = [tensor.to(dtype).requires_grad_() for tensor in (q[:, :, -queries:], k, v)]
        o = attend(*arguments, scale=scale)
        return [o, *torch.autograd.grad(o, arguments, dy.to(dtype))]

    expected = results(_by_formula, torch.float64)
    for attend in (kernels.causal_attention, reference.causal_attention):
        for got, truth in zip(results(attend, torch.float32), expected, strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=1e-3, atol=1e-3)


def _by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    scores = q @ k.transpose(2, 3) * scale
    causal = torch.ones_like(scores, dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])
    return scores.masked_fill(~causal, float("-inf")).softmax(3) @ v
