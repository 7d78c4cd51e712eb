"""What only the feed-forward promises: its two implementations, and which one it takes."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels
from kernels import ffn, tile, tuning
from kernels.tma import supports_tma
from tests.support.oracle import DEVICE

CPU = torch.device("cpu")
HALF, FLOAT32 = torch.bfloat16, torch.float32


def up(architecture: str = "sm_90", rows: int = 32_768, width: int = 768, dtype: torch.dtype = HALF, **options) -> dict:
    """What is taken for the forward."""
    problem = {"activation": "gelu_tanh", "has_bias": True, "save_z": True, "aligned": True, "implementation": "auto"}
    with tuning.assume_architecture(architecture):
        return ffn._UP.candidates(CPU, rows, width, dtype, *(problem | options).values())[0]


def down(architecture: str = "sm_90", rows: int = 32_768, width: int = 768, dtype: torch.dtype = HALF, **options):
    """What is taken for the backward."""
    problem = {"activation": "gelu_tanh", "bias_gradient": True, "aligned": True, "implementation": "auto"}
    with tuning.assume_architecture(architecture):
        return ffn._DOWN_BACKWARD.candidates(CPU, rows, width, dtype, *(problem | options).values())[0]


@pytest.mark.parametrize(
    ("width", "forward", "backward"),
    [(768, "fused", "fused"), (1024, "fused", "fused"), (1600, "unfused", "fused"), (4096, "unfused", "unfused")],
)
def test_narrow_models_fuse_and_wide_ones_leave_it_to_cublas(width, forward, backward):
    assert (up(width=width)["implementation"], down(width=width)["implementation"]) == (forward, backward)


@pytest.mark.parametrize("choice", [up, down])
def test_few_rows_and_float32_are_left_to_cublas(choice):
    assert [choice(rows=rows)["implementation"] for rows in (1, 64, 128)] == ["unfused", "unfused", "fused"]
    assert choice(dtype=FLOAT32)["implementation"] == "unfused"


def test_inference_fuses_only_what_cublas_cannot(monkeypatch):
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(False))
    assert up(save_z=False)["implementation"] == "unfused"
    assert up(save_z=False, activation="relu")["implementation"] == "unfused"
    assert up(save_z=False, activation="gelu")["implementation"] == "fused"
    assert up(save_z=False, has_bias=False)["implementation"] == "fused"


@pytest.mark.parametrize("choice", [up, down])
def test_descriptors_are_for_chips_and_tensors_that_have_them(choice):
    described = {
        name: choice(name)["DESCRIPTORS"] for name in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
    }
    assert described == {
        "sm_80": False, "sm_89": False, "sm_90": True, "sm_100": True, "sm_120": True, "gfx942": False,
    }  # fmt: skip
    assert choice(aligned=False)["DESCRIPTORS"] is False


def matrix(rows: int = 16, cols: int = 32, offset: int = 0, stride: int | None = None) -> Tensor:
    stride = cols if stride is None else stride
    return torch.zeros(offset + rows * stride + 64, dtype=torch.float16).as_strided((rows, cols), (stride, 1), offset)


def test_what_descriptors_can_tell():
    assert supports_tma(matrix(), matrix(stride=40))
    assert not supports_tma(matrix(), matrix(offset=1))
    assert not supports_tma(matrix(), matrix(stride=33))
    assert not supports_tma(matrix(), matrix().T)
    assert not supports_tma(matrix()[:1].expand(16, 32))
    assert supports_tma(matrix(offset=8))
    assert supports_tma(matrix(1, 32, stride=33))  # one row: its stride is never taken


def tensors(rows: int = 70, width: int = 32, hidden: int = 64, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    shapes = ((rows, width), (hidden, width), (hidden,), (width, hidden), (width,))
    return [(0.1 * torch.randn(shape)).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def launched(*arguments, **options) -> list[tuple[str, bool]]:
    """Names of the kernels of a forward and backward, and whether they were given descriptors."""
    names = []

    def note(kernel):
        run = kernel.run

        def noting(*args, **kwargs):
            names.append((kernel.__name__, any(isinstance(argument, TensorDescriptor) for argument in args)))
            return run(*args, **kwargs)

        return patch.object(kernel, "run", noting)

    all_kernels = ("_ffn_up_kernel", "_ffn_down_backward_kernel", "_activation_kernel", "_activation_backward_kernel")
    patches = [note(getattr(ffn, name)) for name in all_kernels]
    for one in patches:
        one.start()
    try:
        y = kernels.gelu_ffn(*arguments, **options)
        y.backward(torch.ones_like(y))
    finally:
        for one in patches:
            one.stop()
    return names


def test_each_implementation_launches_its_own_kernels():
    assert launched(*tensors(), implementation="fused") == [
        ("_ffn_up_kernel", True),
        ("_ffn_down_backward_kernel", True),
    ]
    assert launched(*tensors(width=33), implementation="fused") == [
        ("_ffn_up_kernel", False),
        ("_ffn_down_backward_kernel", False),
    ]
    assert launched(*tensors(), implementation="unfused") == [
        ("_activation_kernel", False),
        ("_activation_backward_kernel", False),
    ]


@pytest.mark.parametrize("implementation", ["fused", "unfused"])
def test_only_the_pre_activation_is_kept(implementation):
    """Beside the inputs: eager PyTorch keeps the hidden layer before and after the activation."""
    arguments = tensors()
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.gelu_ffn(*arguments, implementation=implementation)
    beside = [size for address, size in kept.items() if address not in {t.data_ptr() for t in arguments}]
    assert beside == [70 * 64]


def test_a_frozen_model_computes_the_gradient_of_x_alone():
    x, *weights = tensors()
    for weight in weights:
        weight.requires_grad_(False)
    outcomes = {}
    for implementation in ("fused", "unfused"):
        x.grad = None
        launches = launched(x, *weights, implementation=implementation)
        outcomes[implementation] = x.grad
        assert len(launches) == 2
    torch.testing.assert_close(outcomes["fused"], outcomes["unfused"], rtol=0.01, atol=0.01)


def test_the_last_bias_alone_needs_no_kernel_in_the_backward():
    *others, bias = tensors()
    for tensor in others:
        tensor.requires_grad_(False)
    assert launched(*others, bias, implementation="fused") == [("_ffn_up_kernel", True)]
    assert torch.equal(bias.grad, torch.full_like(bias, 70.0))


def test_an_unknown_implementation_is_refused():
    for function in (kernels.gelu_ffn, kernels.reference.gelu_ffn):
        with pytest.raises(ValueError, match="implementation must be one of auto, fused, unfused, got 'cublas'"):
            function(*tensors(), implementation="cublas")


def test_gradients_under_autocast_are_handed_over_as_they_are_summed():
    """In float32; of the weights on GPUs alone, whose products can widen their result."""
    x, w_up, w_down = (torch.randn(shape, device=DEVICE) for shape in ((50, 16), (24, 16), (16, 24)))
    biases = [torch.randn(size, device=DEVICE, requires_grad=True) for size in (24, 16)]
    weights = [w.requires_grad_() for w in (w_up, w_down)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = kernels.gelu_ffn(x, w_up, biases[0], w_down, biases[1])
    y.backward(torch.randn(50, 16, device=DEVICE).to(y.dtype))
    for parameter in biases + (weights if DEVICE.type == "cuda" else []):
        assert parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter.grad, parameter.grad.bfloat16().float())
