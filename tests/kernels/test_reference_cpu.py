"""The eager operators on a CPU: equal to the reference by the rule, dropout with the right share and its own mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference, reference_cpu
from tests.support.oracle import assert_equal_to_oracle

SHAPES = [(1, 1, 1, 16), (2, 77, 3, 20), (1, 129, 2, 64), (3, 64, 4, 32), (0, 8, 2, 16), (1, 0, 2, 16)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def gradient_and_result(function, qkv: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    qkv = qkv.detach().requires_grad_()
    o = function(qkv)
    (dqkv,) = torch.autograd.grad(o, qkv, upstream)
    return {"o": o.detach(), "dqkv": dqkv}


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, T, H, D = shape
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in ((B, T, 3, H, D), (B, T, H, D)))


def assert_equal_to_reference(ours, theirs, qkv: Tensor, upstream: Tensor) -> None:
    actual = gradient_and_result(ours, qkv, upstream)
    same_dtype = gradient_and_result(theirs, qkv, upstream)
    oracle = gradient_and_result(theirs, qkv.double(), upstream.double())
    assert actual["o"].is_contiguous()
    for name, result in actual.items():
        assert_equal_to_oracle(name, result, same_dtype[name], oracle[name])


def test_a_namespace_of_the_references_operators():
    names = {name for name in reference_cpu.__all__ if name != "dropout"}
    assert all(callable(getattr(reference, name)) for name in names)
    changed = {name for name in names if getattr(reference_cpu, name) is not getattr(reference, name)}
    assert changed == {"add_layer_norm", "causal_attention_qkvpacked", "decode_attention", "int8_linear"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape: tuple[int, ...], dtype: torch.dtype):
    qkv, upstream = draw(shape, dtype)
    assert_equal_to_reference(
        reference_cpu.causal_attention_qkvpacked, reference.causal_attention_qkvpacked, qkv, upstream
    )


@pytest.mark.parametrize("tile", [1, 3 * 77**2, 2**20])
def test_heads_together_or_one_by_one(monkeypatch, tile: int):
    monkeypatch.setattr(reference_cpu, "_TILE", tile)
    qkv, upstream = draw((2, 77, 4, 20), torch.bfloat16)
    assert_equal_to_reference(
        reference_cpu.causal_attention_qkvpacked, reference.causal_attention_qkvpacked, qkv, upstream
    )


def test_long_sequences_are_computed_in_float32(monkeypatch):
    """And keep no probabilities."""
    monkeypatch.setattr(reference_cpu._Attention, "apply", None)
    qkv, upstream = draw((1, 520, 1, 16), torch.bfloat16)
    assert_equal_to_reference(
        reference_cpu.causal_attention_qkvpacked, reference.causal_attention_qkvpacked, qkv, upstream
    )


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_dropout(monkeypatch, dtype: torch.dtype, scale: float | None):
    """Given a mask; its share is 2**-16 of a number, and the reference grows by that too."""
    B, T, H, _ = shape = (2, 33, 3, 20)
    qkv, upstream = draw(shape, dtype)
    kept = torch.rand(B * H, T, T, generator=torch.Generator().manual_seed(1)) >= 0.25
    monkeypatch.setattr(reference_cpu, "_kept", lambda shape, p: (kept.view(torch.uint8).view(shape), 1.0 / (1.0 - p)))

    def theirs(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return reference.attention_with_mask(q, k, v, scale, 0.25, kept.view(B, H, T, T)).transpose(1, 2)

    assert_equal_to_reference(lambda x: reference_cpu.causal_attention_qkvpacked(x, scale, 0.25), theirs, qkv, upstream)


def test_attention_drops_probabilities():
    """Equal scores and values that are the identity matrix: the result is the dropped-out probabilities."""
    T = 64
    qkv = torch.zeros(8, T, 3, 4, T)
    qkv[:, :, 2] = torch.eye(T)[:, None]
    torch.manual_seed(0)
    o = reference_cpu.causal_attention_qkvpacked(qkv, dropout_p=0.25)  # [B, T, H, T]
    past = torch.ones(T, T, dtype=torch.bool).tril()[:, None].expand_as(o)
    share = (o[past] != 0).float().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / int(past.sum())) ** 0.5
    assert not o[~past].any()
    expected = 1.0 / torch.arange(1, T + 1)[:, None, None] / 0.75
    torch.testing.assert_close(o[o != 0], expected.expand_as(o)[o != 0])


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout(dtype: torch.dtype, p: float):
    torch.manual_seed(0)
    x = torch.ones(77, 1001, dtype=dtype, requires_grad=True)
    y = reference_cpu.dropout(x, p)
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept].float(), torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=5e-3, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)


@pytest.mark.parametrize("dim", [0, 1])
def test_dropout_is_independent_of_its_neighbours(dim: int):
    torch.manual_seed(0)
    y = reference_cpu.dropout(torch.ones(512, 512), 0.5)
    agree = (y.diff(dim=dim) == 0).float().mean().item()
    assert abs(agree - 0.5) < 4 * (0.25 / y.numel()) ** 0.5


@pytest.mark.parametrize("draw_once", [
    lambda: reference_cpu.dropout(torch.ones(100), 0.5),
    lambda: reference_cpu.add_layer_norm(torch.ones(5, 20), torch.zeros(5, 20), None, None, dropout_p=0.5)[1],
    lambda: reference_cpu.causal_attention_qkvpacked(torch.ones(1, 20, 3, 1, 16), dropout_p=0.5),
])  # fmt: skip
def test_the_mask_comes_from_the_global_generator(draw_once):
    torch.manual_seed(0)
    first, second = draw_once(), draw_once()
    torch.manual_seed(0)
    assert torch.equal(draw_once(), first)
    assert not torch.equal(first, second)


def test_the_norm_adds_what_dropout_left():
    torch.manual_seed(0)
    x, residual = torch.rand(50, 40) + 1.0, torch.rand(50, 40)
    y, h = reference_cpu.add_layer_norm(x, residual, None, None, dropout_p=0.2)
    left = h - residual
    dropped = left.abs() < 1e-6
    assert 0.1 < dropped.float().mean() < 0.3
    torch.testing.assert_close(left[~dropped], x[~dropped] / 0.8, rtol=1e-4, atol=0)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(h, (40,)))


def test_a_seed_is_the_references():
    x, qkv = torch.rand(5, 20), torch.rand(1, 20, 3, 1, 16)
    for one, other in zip(
        reference_cpu.add_layer_norm(x, x, None, None, dropout_p=0.5, seed=1),
        reference.add_layer_norm(x, x, None, None, dropout_p=0.5, seed=1),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert torch.equal(
        reference_cpu.causal_attention_qkvpacked(qkv, dropout_p=0.5, seed=1),
        reference.causal_attention_qkvpacked(qkv, dropout_p=0.5, seed=1),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_they_compile_whole(dropout_p: float):
    def both(qkv: Tensor) -> Tensor:
        o = reference_cpu.causal_attention_qkvpacked(qkv, dropout_p=dropout_p)
        return reference_cpu.dropout(o, 0.5) if dropout_p else o

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    qkv, upstream = draw((2, 17, 2, 16), torch.bfloat16)
    found = gradient_and_result(compiled, qkv, upstream)
    if not dropout_p:
        torch.testing.assert_close(found["o"], both(qkv), rtol=2e-2, atol=2e-2)


def test_bad_arguments_are_the_references():
    qkv = torch.zeros(1, 4, 3, 2, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dropout_p must be"):
        reference_cpu.causal_attention_qkvpacked(qkv, dropout_p=1.0)
    with pytest.raises((ValueError, TypeError), match="qkv"):
        reference_cpu.causal_attention_qkvpacked(qkv[:, :, :2])
    with pytest.raises(ValueError, match="dropout_p must be"):
        reference_cpu.add_layer_norm(qkv, qkv, None, None, dropout_p=-0.5)


def test_a_second_derivative_raises():
    qkv, upstream = draw((1, 4, 2, 8), torch.bfloat16)
    qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(
        reference_cpu.causal_attention_qkvpacked(qkv), qkv, upstream.requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("lengths", [[5, 5], [3, 5], [0, 4], [0, 0], [2, 2], [9, 9], [12, 12]], ids=str)
def test_decode_attention_is_the_reference(lengths, queries):
    """Also where all sequences are equally long, and nothing is masked."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (queries, 9, 9))
    longest = max(lengths)
    k[:, :, longest:] = v[:, :, longest:] = torch.nan  # nobody is to look at it
    given = torch.tensor(lengths, dtype=torch.int32)
    found = reference_cpu.decode_attention(q, k, v, given, 0.3)
    expected = reference.decode_attention(q, k.nan_to_num(), v.nan_to_num(), given, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_decode_attention_refuses_what_the_reference_does():
    q, k = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 9, 8)
    for lengths in ([5, 5], [3, 5]):
        with pytest.raises((TypeError, ValueError), match="decode_attention: v_cache"):
            reference_cpu.decode_attention(q, k, k[:, :2], torch.tensor(lengths))
