"""The two implementations of the feed-forward: their choice, their kernels, and what they save."""

from __future__ import annotations

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


def config(
    launch: str, architecture: str = "sm_90", rows: int = 32_768, width: int = 768, dtype: torch.dtype = HALF, **changes
) -> dict:
    """The default configuration of "ffn_up" or "ffn_down_backward", for a GPT-2 in training unless changed."""
    key = {"activation": "gelu_tanh", "bias": True}
    if launch == "ffn_up":
        key["save_z"] = True
    key |= {"aligned": True, "implementation": "auto"} | changes
    with tuning.assume_architecture(architecture):
        return tuning.TUNABLES[launch].candidates(CPU, rows, width, dtype, *key.values())[0]


@pytest.mark.parametrize(
    ("width", "forward", "backward"),
    [(768, "fused", "fused"), (1024, "fused", "fused"), (1600, "unfused", "fused"), (4096, "unfused", "unfused")],
)
def test_gelu_ffn_fuses_narrow_models_only(width, forward, backward):
    assert config("ffn_up", width=width)["implementation"] == forward
    assert config("ffn_down_backward", width=width)["implementation"] == backward


@pytest.mark.parametrize("launch", ["ffn_up", "ffn_down_backward"])
def test_gelu_ffn_leaves_few_rows_and_float32_to_cublas(launch: str):
    assert [config(launch, rows=rows)["implementation"] for rows in (1, 64, 128)] == ["unfused", "unfused", "fused"]
    assert config(launch, dtype=FLOAT32)["implementation"] == "unfused"


def test_gelu_ffn_fuses_in_inference_only_what_cublas_cannot(monkeypatch):
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(False))
    assert config("ffn_up", save_z=False)["implementation"] == "unfused"
    assert config("ffn_up", save_z=False, activation="relu")["implementation"] == "unfused"
    assert config("ffn_up", save_z=False, activation="gelu")["implementation"] == "fused"
    assert config("ffn_up", save_z=False, bias=False)["implementation"] == "fused"


@pytest.mark.parametrize("launch", ["ffn_up", "ffn_down_backward"])
def test_gelu_ffn_uses_tma_on_chips_that_have_it_and_aligned_tensors(launch: str):
    architectures = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
    with_tma = [name for name in architectures if config(launch, name)["DESCRIPTORS"]]
    assert with_tma == ["sm_90", "sm_100", "sm_120"]
    assert not config(launch, aligned=False)["DESCRIPTORS"]


def matrix(rows: int = 16, cols: int = 32, offset: int = 0, stride: int | None = None) -> Tensor:
    stride = cols if stride is None else stride
    return torch.zeros(offset + rows * stride + 64, dtype=torch.float16).as_strided((rows, cols), (stride, 1), offset)


def test_supports_tma_accepts_aligned_tensors_only():
    assert supports_tma(matrix(), matrix(stride=40))
    assert not supports_tma(matrix(), matrix(offset=1))
    assert not supports_tma(matrix(), matrix(stride=33))
    assert not supports_tma(matrix(), matrix().T)
    assert not supports_tma(matrix()[:1].expand(16, 32))
    assert supports_tma(matrix(offset=8))
    assert supports_tma(matrix(1, 32, stride=33))  # the stride of a single row does not matter


def tensors(rows: int = 70, width: int = 32, hidden: int = 64, dtype: torch.dtype = torch.float16) -> list[Tensor]:
    shapes = ((rows, width), (hidden, width), (hidden,), (width, hidden), (width,))
    return [(0.1 * torch.randn(shape)).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def launched(monkeypatch, *arguments, **options) -> list[tuple[str, bool]]:
    """Run a forward and a backward. Returns the names of the kernels, and whether they took descriptors."""
    names = []

    def record(kernel):
        run = kernel.run

        def recording(*args, **kwargs):
            names.append((kernel.__name__, any(isinstance(argument, TensorDescriptor) for argument in args)))
            return run(*args, **kwargs)

        context.setattr(kernel, "run", recording)

    with monkeypatch.context() as context:
        for name in ("_ffn_up", "_ffn_down_backward", "_activation", "_activation_backward"):
            record(getattr(ffn, f"{name}_kernel"))
        y = kernels.gelu_ffn(*arguments, **options)
        y.backward(torch.ones_like(y))
    return names


@pytest.mark.parametrize(
    ("width", "implementation", "names", "descriptors"),
    [
        (32, "fused", ["_ffn_up_kernel", "_ffn_down_backward_kernel"], True),
        (33, "fused", ["_ffn_up_kernel", "_ffn_down_backward_kernel"], False),
        (32, "unfused", ["_activation_kernel", "_activation_backward_kernel"], False),
    ],
)
def test_gelu_ffn_launches_the_kernels_of_the_implementation(monkeypatch, width, implementation, names, descriptors):
    found = launched(monkeypatch, *tensors(width=width), implementation=implementation)
    assert found == [(name, descriptors) for name in names]


@pytest.mark.parametrize("implementation", ["fused", "unfused"])
def test_gelu_ffn_saves_only_the_pre_activation_beside_its_inputs(implementation):
    arguments = tensors()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernels.gelu_ffn(*arguments, implementation=implementation)
    inputs = {t.data_ptr() for t in arguments}
    assert [size for address, size in saved.items() if address not in inputs] == [70 * 64]


def test_gelu_ffn_with_frozen_weights_computes_the_gradient_of_x(monkeypatch):
    x, *weights = tensors()
    for weight in weights:
        weight.requires_grad_(False)
    outcomes = {}
    for implementation in ("fused", "unfused"):
        x.grad = None
        assert len(launched(monkeypatch, x, *weights, implementation=implementation)) == 2
        outcomes[implementation] = x.grad
    torch.testing.assert_close(outcomes["fused"], outcomes["unfused"], rtol=0.01, atol=0.01)


def test_gelu_ffn_needs_no_backward_kernel_for_the_last_bias(monkeypatch):
    *others, bias = tensors()
    for tensor in others:
        tensor.requires_grad_(False)
    assert launched(monkeypatch, *others, bias, implementation="fused") == [("_ffn_up_kernel", True)]
    assert torch.equal(bias.grad, torch.full_like(bias, 70.0))


def test_gelu_ffn_under_autocast_gives_float32_gradients_without_rounding():
    """Gradients of weights on GPUs only, whose matmuls have a float32 output."""
    x, w_up, w_down = (torch.randn(shape, device=DEVICE) for shape in ((50, 16), (24, 16), (16, 24)))
    biases = [torch.randn(size, device=DEVICE, requires_grad=True) for size in (24, 16)]
    weights = [w.requires_grad_() for w in (w_up, w_down)]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = kernels.gelu_ffn(x, w_up, biases[0], w_down, biases[1])
    y.backward(torch.randn(50, 16, device=DEVICE).to(y.dtype))
    for parameter in biases + (weights if DEVICE.type == "cuda" else []):
        assert parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter.grad, parameter.grad.bfloat16().float())
