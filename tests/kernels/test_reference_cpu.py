"""`kernels.reference_cpu` against the reference, and its dropout by share, independence and mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kernels import reference, reference_cpu
from tests.support.oracle import assert_equal_to_oracle

# the last ones are computed in two groups of heads, and without saved probabilities
SHAPES = [
    (1, 1, 1, 16), (2, 77, 3, 20), (1, 129, 2, 64), (3, 64, 4, 32), (0, 8, 2, 16), (1, 0, 2, 16), (1, 512, 5, 16),
    (1, 520, 1, 16),
]  # fmt: skip
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def draw(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """qkv and the upstream gradient of its attention."""
    B, T, H, D = shape
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator).to(dtype) for s in ((B, T, 3, H, D), (B, T, H, D)))


def output_and_gradient(function, qkv: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    qkv = qkv.detach().requires_grad_()
    o = function(qkv)
    (dqkv,) = torch.autograd.grad(o, qkv, upstream)
    return {"o": o.detach(), "dqkv": dqkv}


def assert_equal_to_reference(ours, theirs, qkv: Tensor, upstream: Tensor) -> None:
    actual = output_and_gradient(ours, qkv, upstream)
    same_dtype = output_and_gradient(theirs, qkv, upstream)
    oracle = output_and_gradient(theirs, qkv.double(), upstream.double())
    assert actual["o"].is_contiguous()
    for name, result in actual.items():
        assert_equal_to_oracle(name, result, same_dtype[name], oracle[name])


def test_operators_without_an_implementation_are_the_references():
    operators = {name: getattr(reference_cpu, name) for name in reference_cpu.__all__}
    faster = {name for name, operator in operators.items() if operator is not getattr(reference, name)}
    assert faster == {"add_layer_norm", "causal_attention_qkvpacked", "decode_attention", "int8_linear"}
    with pytest.raises(AttributeError, match="rms_norm"):
        reference_cpu.rms_norm  # noqa: B018


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype):
    assert_equal_to_reference(
        reference_cpu.causal_attention_qkvpacked, reference.causal_attention_qkvpacked, *draw(shape, dtype)
    )


def test_attention_over_long_sequences_saves_no_probabilities():
    saved = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor):
        reference_cpu.causal_attention_qkvpacked(draw((1, 520, 1, 16), torch.bfloat16)[0].requires_grad_())
    assert 0 < max(saved) < 520**2


def dropped_probabilities(B: int, T: int, H: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Attention probabilities [B, H, T, T] after dropout: scores are equal, and v is the identity matrix."""
    qkv = torch.zeros(B, T, 3, H, T, dtype=dtype)
    qkv[:, :, 2] = torch.eye(T)[:, None]
    torch.manual_seed(0)
    return reference_cpu.causal_attention_qkvpacked(qkv, dropout_p=0.25).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_dropout_equals_the_reference_with_its_mask(dtype: torch.dtype, scale: float | None):
    B, T, H, _ = shape = (2, 33, 3, 20)
    kept = dropped_probabilities(B, T, H, dtype) != 0

    def ours(qkv: Tensor) -> Tensor:
        torch.manual_seed(0)
        return reference_cpu.causal_attention_qkvpacked(qkv, scale, 0.25)

    def theirs(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        return reference.attention_with_mask(q, k, v, scale, 0.25, kept).transpose(1, 2)

    assert_equal_to_reference(ours, theirs, *draw(shape, dtype))


def test_attention_drops_its_share_of_probabilities():
    T = 64
    p = dropped_probabilities(8, T, 4)
    past = torch.ones(T, T, dtype=torch.bool).tril().expand_as(p)
    share = (p[past] != 0).float().mean().item()
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / int(past.sum())) ** 0.5
    assert not p[~past].any()
    expected = 1.0 / torch.arange(1, T + 1)[:, None] / 0.75
    torch.testing.assert_close(p[p != 0], expected.expand_as(p)[p != 0])


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_keeps_its_share_and_scales_it(dtype: torch.dtype, p: float):
    torch.manual_seed(0)
    x = torch.ones(77, 1001, dtype=dtype, requires_grad=True)
    y = reference_cpu.dropout(x, p)
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    torch.testing.assert_close(y[kept].float(), torch.full((int(kept.sum()),), 1 / (1 - p)), rtol=5e-3, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y)


@pytest.mark.parametrize("dim", [0, 1])
def test_dropout_of_neighbours_is_independent(dim: int):
    torch.manual_seed(0)
    y = reference_cpu.dropout(torch.ones(512, 512), 0.5)
    agree = (y.diff(dim=dim) == 0).float().mean().item()
    assert abs(agree - 0.5) < 4 * (0.25 / y.numel()) ** 0.5


@pytest.mark.parametrize("draw_once", [
    lambda: reference_cpu.dropout(torch.ones(100), 0.5),
    lambda: reference_cpu.add_layer_norm(torch.ones(5, 20), torch.zeros(5, 20), None, None, dropout_p=0.5)[1],
    lambda: reference_cpu.causal_attention_qkvpacked(torch.ones(1, 20, 3, 1, 16), dropout_p=0.5),
])  # fmt: skip
def test_dropout_draws_from_the_global_generator(draw_once):
    torch.manual_seed(0)
    first, second = draw_once(), draw_once()
    torch.manual_seed(0)
    assert torch.equal(draw_once(), first)
    assert not torch.equal(first, second)


def test_add_layer_norm_adds_what_dropout_keeps():
    torch.manual_seed(0)
    x, residual = torch.rand(50, 40) + 1.0, torch.rand(50, 40)
    y, h = reference_cpu.add_layer_norm(x, residual, None, None, dropout_p=0.2)
    added = h - residual
    dropped = added.abs() < 1e-6
    assert 0.1 < dropped.float().mean() < 0.3
    torch.testing.assert_close(added[~dropped], x[~dropped] / 0.8, rtol=1e-4, atol=0)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(h, (40,)))


@pytest.mark.parametrize(("name", "arguments"), [
    ("add_layer_norm", (torch.ones(5, 20), torch.ones(5, 20), None, None)),
    ("causal_attention_qkvpacked", (torch.rand(1, 20, 3, 1, 16),)),
])  # fmt: skip
def test_a_seed_gives_the_bits_of_the_reference(name: str, arguments: tuple):
    found, expected = (getattr(m, name)(*arguments, dropout_p=0.5, seed=1) for m in (reference_cpu, reference))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_operators_compile_into_one_graph(dropout_p: float):
    def both(qkv: Tensor) -> Tensor:
        o = reference_cpu.causal_attention_qkvpacked(qkv, dropout_p=dropout_p)
        return reference_cpu.dropout(o, 0.5) if dropout_p else o

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    qkv, upstream = draw((2, 17, 2, 16), torch.bfloat16)
    found = output_and_gradient(compiled, qkv, upstream)
    if not dropout_p:
        torch.testing.assert_close(found["o"], both(qkv), rtol=2e-2, atol=2e-2)


def test_attention_raises_for_a_second_derivative():
    qkv, upstream = draw((1, 4, 2, 8), torch.bfloat16)
    qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(
        reference_cpu.causal_attention_qkvpacked(qkv), qkv, upstream.requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("lengths", [[5, 5], [3, 5], [0, 4], [0, 0], [2, 2], [9, 9], [12, 12]], ids=str)
def test_decode_attention_equals_the_reference_and_does_not_read_past_the_longest(lengths, queries):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (queries, 9, 9))
    k[:, :, max(lengths) :] = v[:, :, max(lengths) :] = torch.nan
    given = torch.tensor(lengths, dtype=torch.int32)
    found = reference_cpu.decode_attention(q, k, v, given, 0.3)
    expected = reference.decode_attention(q, k.nan_to_num(), v.nan_to_num(), given, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
