"""Properties of the norms that no other operator has."""

import pytest
import torch

import kernels
from kernels import norm, reference
from tests.support.oracle import DEVICE


def test_layer_norm_keeps_the_gradient_of_a_float32_bias_in_float32():
    x = torch.randn(500, 16, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    y = kernels.layer_norm(x, torch.ones(16, device=DEVICE, dtype=torch.bfloat16), bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(bias.grad, dy.float().sum(0), rtol=1e-5, atol=1e-5)


def added(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(5, 33, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))


def test_add_layer_norm_gives_x_and_residual_separate_gradients():
    """Without dropout the gradients are equal, but an in-place change of one must not reach the other."""
    x, residual = added()
    y, h = kernels.add_layer_norm(x, residual, None, None)
    (y.square() + h).sum().backward()
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


def test_add_layer_norm_adds_a_tensor_to_itself():
    x, _ = added()
    y, h = kernels.add_layer_norm(x, x, None, None)
    assert torch.equal(h, 2 * x)
    dy, dh = torch.randn_like(y), torch.randn_like(h)
    (gradient,) = torch.autograd.grad((y, h), x, (dy, dh))
    expected = reference.add_layer_norm(x, x, None, None)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, x, (dy, dh)), rtol=1e-4, atol=1e-5)


def test_add_layer_norm_normalises_the_rounded_sum():
    """A block recomputed from h is bitwise the block that ran."""
    x, residual = added(torch.bfloat16)
    y, h = kernels.add_layer_norm(x, residual, None, None)
    assert torch.equal(y, kernels.layer_norm(h, None, None))


@pytest.mark.parametrize("width", [48, 8200])
@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_layer_norm_backward_returns_only_the_requested_gradients(width: int, wanted: tuple[bool, bool]):
    x, dy = torch.randn(2, 5, width, device=DEVICE).unbind()
    weight, bias = torch.randn(2, width, device=DEVICE).unbind()
    _, mean, rstd = norm._forward(x, weight, bias, 1e-5, x.dtype)
    dx, rows = norm._backward(dy, x, weight, mean, rstd, *wanted)
    all_dx, all_rows = norm._backward(dy, x, weight, mean, rstd, True, True)
    assert torch.equal(dx, all_dx)
    assert torch.equal(rows, all_rows[torch.tensor(wanted, device=DEVICE)])
