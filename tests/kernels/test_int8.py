"""Quantization to int8, and the int8 linear layer: exactness, memory, and the implementation for each size."""

from __future__ import annotations

import re
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import kernels
from kernels import pytorch_internals, reference, reference_cpu
from tests.support.memory import peak_bytes
from tests.support.oracle import DEVICE, assert_equal_to_oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CPU = torch.device("cpu")


def problem(rows: tuple[int, ...], width: int, outputs: int, dtype: torch.dtype, device: torch.device = DEVICE):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, width, generator=generator).to(device, dtype)
    weight = width**-0.5 * torch.randn(outputs, width, generator=generator)
    bias = torch.randn(outputs, generator=generator).to(device, dtype)
    return x, *kernels.quantize_int8(weight.to(device)), bias


def dequantized_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Dequantize in float64, then multiply: another order of operations than the operator's."""
    y = torch.einsum("...k,nk->...n", x.double(), weight.double() * scale.double()[:, None])
    return y if bias is None else y + bias.double()


def assert_cpu_equals_the_definition(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    y, same_dtype = (f(x, weight, scale, bias) for f in (reference_cpu.int8_linear, reference.int8_linear))
    assert y.is_contiguous()
    assert_equal_to_oracle("y", y, same_dtype, dequantized_linear(x, weight, scale, bias))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (3, 1000)], ids=str)
def test_quantize_int8_rounds_by_half_a_step_at_most(shape: tuple[int, int], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    # rows of very different magnitude
    weight = (torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None]).to(DEVICE, dtype)
    q, scale = kernels.quantize_int8(weight)
    assert (q.dtype, q.shape, q.device) == (torch.int8, weight.shape, weight.device)
    assert (scale.dtype, scale.shape, scale.device) == (torch.float32, weight.shape[:1], weight.device)
    torch.testing.assert_close(scale.double(), weight.double().abs().amax(1) / 127, rtol=2**-23, atol=0)
    steps = (weight.double() - q.double() * scale.double()[:, None]).abs() / scale.double()[:, None]
    assert steps.max() <= 0.5 + 127 * 2**-23  # and the rounding of the quotient
    assert (q.abs().amax(1) == 127).all()
    assert not weight.requires_grad


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_quantize_int8_rounds_ties_to_even_and_is_symmetric(dtype: torch.dtype):
    rows = [[127, 0.5, 1.5, 2.5, -0.5, -1.5, 0.25], [-127, 126.5, 125.5, -126.5, 3, -3, 0.75], [0, 0, -0.0, 0, 0, 0, 0]]
    weight = torch.tensor(rows, device=DEVICE, dtype=dtype)
    q, scale = kernels.quantize_int8(weight)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, 0], [-127, 126, 126, -126, 3, -3, 1], [0] * 7]
    assert scale.tolist() == [1.0, 1.0, 1.0]
    opposite, same_scale = kernels.quantize_int8(-weight)
    assert torch.equal(opposite, -q)
    assert torch.equal(same_scale, scale)


def test_quantize_int8_is_idempotent():
    q, scale = kernels.quantize_int8(torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    again, same_scale = kernels.quantize_int8(q * scale[:, None])
    assert torch.equal(again, q)
    torch.testing.assert_close(same_scale, scale, rtol=2**-22, atol=0)


@pytest.mark.parametrize("size", [1e-37, 1e-38, 3e-42, 1e-45, 1e-320])
def test_quantize_int8_makes_zeros_of_rows_with_a_subnormal_scale(size: float):
    weight = torch.tensor([[size, -size / 2], [1.0, 0.25]], dtype=torch.float64, device=DEVICE)
    q, scale = kernels.quantize_int8(weight)
    assert scale[0] == 1.0
    assert not q[0].any()
    assert q[1].tolist() == [127, 32]
    assert kernels.quantize_int8(1e3 * torch.finfo(torch.float32).tiny * weight[1:])[0].tolist() == [[127, 32]]


def test_quantize_int8_takes_strided_tensors_parameters_and_meta_tensors():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, scale = kernels.quantize_int8(weight)
    for same in (weight.t().contiguous().t(), torch.nn.Parameter(weight)):
        other, other_scale = kernels.quantize_int8(same)
        assert torch.equal(other, q)
        assert torch.equal(other_scale, scale)
        assert not other_scale.requires_grad
    meta, meta_scale = kernels.quantize_int8(weight.to("meta"))
    assert (meta.shape, meta.dtype, meta_scale.shape, meta_scale.dtype) == (q.shape, q.dtype, scale.shape, scale.dtype)
    assert reference.quantize_int8 is kernels.quantize_int8


@pytest.mark.parametrize(
    ("weight", "error", "value"),
    [
        ([[1.0]], TypeError, "list"),
        (torch.ones(2, 3, dtype=torch.int8), TypeError, "torch.int8"),
        (torch.ones(2, 3, dtype=torch.float8_e5m2), TypeError, "torch.float8_e5m2"),
        (torch.ones(3), ValueError, "(3,)"),
        (torch.ones(1, 2, 3), ValueError, "(1, 2, 3)"),
        (torch.ones(0, 3), ValueError, "(0, 3)"),
        (torch.ones(3, 0), ValueError, "(3, 0)"),
        (torch.tensor([[1.0, 2.0], [3.0, float("nan")]]), ValueError, "NaN or infinity in row 1"),
        (torch.tensor([[float("-inf"), 2.0]]), ValueError, "NaN or infinity in row 0"),
        (torch.tensor([[1e39]], dtype=torch.float64), ValueError, "infinity in row 0"),
    ],
    ids=str,
)
def test_quantize_int8_rejects_a_weight_with_its_value(weight: object, error: type[Exception], value: str):
    with pytest.raises(error, match=f"^quantize_int8: weight must .*{re.escape(value)}"):
        kernels.quantize_int8(weight)


@pytest.mark.parametrize("rows", [(), (1,), (3,), (20,), (2, 50)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference_is_exact_up_to_one_rounding(rows: tuple[int, ...], dtype: torch.dtype):
    x, weight, scale, bias = problem(rows, 48, 37, dtype)
    for b in (bias, bias.float(), None):
        y = reference.int8_linear(x, weight, scale, b)
        exact = dequantized_linear(x, weight, scale, b)
        assert (y.dtype, y.shape) == (dtype, exact.shape)
        # half precision is rounded once
        ulps = 0.6 if dtype.itemsize == 2 else 8.0
        assert (y.double() - exact).abs().max() <= ulps * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*((m,) for m in range(1, 21)), (), (0,), (2, 1), (5, 13), (70,)], ids=str)
@pytest.mark.parametrize(("width", "outputs"), [(33, 101), (64, 70), (192, 5)])
def test_reference_cpu_equals_the_definition(rows: tuple[int, ...], width: int, outputs: int, dtype: torch.dtype):
    """With widths and row counts that PyTorch's int8 matmul takes, and others."""
    x, weight, scale, bias = problem(rows, width, outputs, dtype, CPU)
    for b in (bias, bias.float(), None):
        assert_cpu_equals_the_definition(x, weight, scale, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_cpu_gives_the_same_bits_for_strided_tensors(dtype: torch.dtype):
    x, weight, scale, bias = problem((3, 5), 128, 40, dtype, CPU)
    expected = reference_cpu.int8_linear(x, weight, scale, bias)
    spread = torch.full((5, 3, 256), float("nan"), dtype=dtype)
    other = spread[:, :, ::2].transpose(0, 1).copy_(x)
    transposed = weight.t().contiguous().t()
    twice = torch.stack((scale, scale), 1)[:, 0]
    assert torch.equal(reference_cpu.int8_linear(other, transposed, twice, bias), expected)


@pytest.mark.parametrize("weight_bytes", [1, 4 * 64 * 3, 2**21])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_cpu_takes_parts_of_any_size(monkeypatch, dtype: torch.dtype, weight_bytes: int):
    monkeypatch.setattr(reference_cpu, "_WEIGHT_BYTES", weight_bytes)
    assert_cpu_equals_the_definition(*problem((17,), 64, 20, dtype, CPU))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_cpu_dequantizes_one_part_at_a_time(dtype: torch.dtype):
    for rows in (1, 17):
        x, weight, scale, _ = problem((rows,), 256, 20_000, dtype, CPU)
        peak = peak_bytes(lambda x=x, weight=weight, scale=scale: reference_cpu.int8_linear(x, weight, scale), CPU)
        assert peak < 2**22 + 3 * rows * 20_000 * 4 < weight.numel() * 2
    assert peak_bytes(lambda: reference.int8_linear(x, weight, scale), CPU) > weight.numel() * 4


def test_reference_cpu_calls_pytorchs_int8_matmul_where_it_is_fast_and_safe():
    """It is not safe for rows whose length is not a multiple of its vectors, which it reads past the end."""
    called = []

    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        called.append(tuple(x.shape))
        return torch.zeros(len(x), len(weight), dtype=x.dtype)

    with patch.object(pytorch_internals, "int8pack_mm", product):
        for rows, width, dtype in (
            (1, 128, torch.bfloat16), (16, 64, torch.bfloat16), (17, 64, torch.bfloat16), (1, 96, torch.bfloat16),
            (1, 33, torch.bfloat16), (1, 128, torch.float32), (1, 128, torch.float16),
        ):  # fmt: skip
            reference_cpu.int8_linear(*problem((rows,), width, 5, dtype, CPU)[:3])
        with torch.autocast("cpu", torch.bfloat16):
            reference_cpu.int8_linear(*problem((2,), 128, 5, torch.float32, CPU)[:3])
    assert called == [(1, 128), (16, 64), (2, 128)]


def test_reference_cpu_does_without_pytorchs_int8_matmul(monkeypatch):
    monkeypatch.setattr(pytorch_internals, "has_int8pack_mm", lambda: False)
    assert_cpu_equals_the_definition(*problem((1,), 64, 20, torch.bfloat16, CPU))


@pytest.mark.parametrize("function", [kernels.int8_linear, reference.int8_linear, reference_cpu.int8_linear])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 40, 70])
def test_autocast_gives_the_bits_of_inputs_in_its_dtype(function, dtype: torch.dtype, rows: int):
    x, weight, scale, bias = problem((rows,), 64, 20, torch.float32)
    expected = function(x.to(dtype), weight, scale, bias)
    with torch.autocast(DEVICE.type, dtype):
        assert torch.equal(function(x, weight, scale, bias), expected)


@pytest.mark.parametrize("rows", [2, 40])
def test_reference_cpu_compiles_into_one_graph(rows: int):
    x, weight, scale, bias = problem((rows,), 64, 20, torch.float32, CPU)
    compiled = torch.compile(reference_cpu.int8_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, scale, bias), reference_cpu.int8_linear(x, weight, scale, bias))


@pytest.mark.parametrize("function", [kernels.int8_linear, reference.int8_linear, reference_cpu.int8_linear])
def test_int8_linear_takes_parameters_without_grad_mode(function):
    x, weight, scale, bias = problem((2,), 64, 8, torch.float32)
    expected = function(x, weight, scale, bias)
    x.requires_grad_(), bias.requires_grad_()
    with pytest.raises(ValueError, match="x requires a gradient"):
        function(x, weight, scale, bias)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = function(x, weight, scale, bias)
        assert torch.equal(y, expected)
        assert not y.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_multiply_all_integers_exactly(dtype: torch.dtype):
    weight = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE).expand(3, 256).contiguous()
    scale = torch.tensor([1.0, 0.5, 2.0], device=DEVICE)
    for rows in (1, 5, 33):
        x = torch.zeros(rows, 256, device=DEVICE, dtype=dtype)
        for column in (0, 1, 64, 127, 128, 129, 200, 255):
            x.zero_()[:, column] = 1.0
            expected = (column - 128) * scale
            assert torch.equal(kernels.int8_linear(x, weight, scale), expected.to(dtype).expand(rows, 3))


@pytest.mark.parametrize("function", [kernels.int8_linear, reference.int8_linear, reference_cpu.int8_linear])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_int8_linear_does_not_overflow_before_the_scale(function, rows: int):
    x = torch.full((rows, 64), 1000.0, device=DEVICE, dtype=torch.float16)
    weight, scale = torch.full((3, 64), 127, dtype=torch.int8, device=DEVICE), torch.full((3,), 1e-3, device=DEVICE)
    torch.testing.assert_close(function(x, weight, scale), torch.full_like(x[:, :3], 8128.0), rtol=1e-3, atol=0)


def test_kernels_keep_all_bits_of_float32():
    """Matrix units multiply the three bfloat16 parts of each number."""
    x = torch.tensor([1 + 2**-23, 1.0, -1 - 2**-22, 3.141592653589793, 1e-30, -1e30], device=DEVICE)
    weight = torch.eye(6, dtype=torch.int8, device=DEVICE)
    for rows in (2, 17, 64):
        y = kernels.int8_linear(x.expand(rows, 6), weight, torch.ones(6, device=DEVICE))
        assert torch.equal(y, x.expand(rows, 6))


def launched(rows: int, dtype: torch.dtype = torch.float32) -> list[str]:
    launches = []

    def run(kernel, *args, **kwargs):
        launches.append(getattr(kernel, "__name__", None) or kernel.fn.__name__)

    with patch.object(InterpretedFunction, "run", run), patch.object(JITFunction, "run", run):
        kernels.int8_linear(*problem((rows,), 32, 20, dtype))
    return launches


def test_the_number_of_rows_selects_the_kernel():
    assert launched(1) == ["_int8_sums_kernel"]
    assert [launched(rows) for rows in (2, 16, 17, 64)] == [["_int8_tiles_kernel"]] * 4
    assert launched(65) == launched(0) == []  # PyTorch's matmul, and nothing


def test_many_rows_take_the_memory_of_one_dequantized_matrix():
    x, weight, scale, _ = problem((100,), 256, 1000, torch.bfloat16)
    peak = peak_bytes(lambda: kernels.int8_linear(x, weight, scale))
    # on a CPU, a multiplication with another dtype for its result needs temporaries
    assert peak < 100 * 1000 * 2 + weight.numel() * (2 if DEVICE.type == "cuda" else 10) + 4096
    few = peak_bytes(lambda: kernels.int8_linear(x[:64], weight, scale))
    assert few < weight.numel() or DEVICE.type == "cpu"
