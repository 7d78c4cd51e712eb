"""What only layer norm promises."""

import torch

import kernels
from kernels import reference
from oracle import DEVICE


def test_autocast_treats_half_precision_input_as_pytorch_does():
    """CUDA's autocast makes layer norm float32, the CPU's leaves it alone."""
    x, weight = torch.randn(3, 5, device=DEVICE, dtype=torch.bfloat16), torch.ones(5, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y, expected = kernels.layer_norm(x, weight, None), reference.layer_norm(x, weight, None)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_parameters_may_be_float32_beside_half_precision_input():
    x, weight, bias = (torch.randn(s, device=DEVICE) for s in ((7, 33), (33,), (33,)))
    weight.requires_grad_()
    y = kernels.layer_norm(x.bfloat16(), weight, bias)
    y.float().sum().backward()
    assert (y.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y, reference.layer_norm(x.bfloat16(), weight, bias), rtol=0.02, atol=0.02)


def test_the_gradient_of_a_float32_bias_is_not_rounded_to_the_dtype_of_the_weight():
    x = torch.randn(500, 16, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    y = kernels.layer_norm(x, torch.ones(16, device=DEVICE, dtype=torch.bfloat16), bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(bias.grad, dy.float().sum(0), rtol=1e-5, atol=1e-5)
