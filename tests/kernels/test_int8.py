"""int8 weights: what quantising loses, which product is taken where, and what its launches are made for."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import kernels
from kernels import int8, pytorch_internals, reference, reference_cpu, runtime, tuning
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


def by_definition(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """In float64, weights first: nothing of the operator's arithmetic."""
    y = torch.einsum("...k,nk->...n", x.double(), weight.double() * scale.double()[:, None])
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 128), (3, 1000)], ids=str)
def test_quantising_loses_half_a_step_at_most(shape: tuple[int, int], dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    # rows of very different size
    weight = (torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None]).to(DEVICE, dtype)
    q, scale = kernels.quantize_int8(weight)
    assert (q.dtype, q.shape, q.device) == (torch.int8, weight.shape, weight.device)
    assert (scale.dtype, scale.shape, scale.device) == (torch.float32, weight.shape[:1], weight.device)
    torch.testing.assert_close(scale.double(), weight.double().abs().amax(1) / 127, rtol=2**-23, atol=0)
    steps = (weight.double() - q.double() * scale.double()[:, None]).abs() / scale.double()[:, None]
    assert steps.max() <= 0.5 + 127 * 2**-23  # a quotient's rounding
    assert (q.abs().amax(1) == 127).all()
    assert not weight.requires_grad


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_quantised_numbers_one_by_one(dtype: torch.dtype):
    """Halves go to the even neighbour; the signs are alike; neither -128 nor a scale of zero appears."""
    weight = torch.tensor(
        [
            [127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.25],
            [-127.0, 126.5, 125.5, -126.5, 3.0, -3.0, 0.75],
            [0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0],
        ],
        device=DEVICE,
        dtype=dtype,
    )
    q, scale = kernels.quantize_int8(weight)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, 0], [-127, 126, 126, -126, 3, -3, 1], [0] * 7]
    assert scale.tolist() == [1.0, 1.0, 1.0]
    opposite, same_scale = kernels.quantize_int8(-weight)
    assert torch.equal(opposite, -q)
    assert torch.equal(same_scale, scale)


def test_what_was_quantised_quantises_to_itself():
    q, scale = kernels.quantize_int8(torch.randn(9, 50, generator=torch.Generator().manual_seed(0)).to(DEVICE))
    again, same_scale = kernels.quantize_int8(q * scale[:, None])
    assert torch.equal(again, q)
    torch.testing.assert_close(same_scale, scale, rtol=2**-22, atol=0)


@pytest.mark.parametrize("size", [1e-37, 1e-38, 3e-42, 1e-45, 1e-320])
def test_rows_too_small_for_a_scale_become_zeros(size: float):
    weight = torch.tensor([[size, -size / 2], [1.0, 0.25]], dtype=torch.float64, device=DEVICE)
    q, scale = kernels.quantize_int8(weight)
    assert scale[0] == 1.0
    assert not q[0].any()
    assert q[1].tolist() == [127, 32]
    assert kernels.quantize_int8(1e3 * torch.finfo(torch.float32).tiny * weight[1:])[0].tolist() == [[127, 32]]


def test_quantising_takes_strides_parameters_and_devices_without_data():
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
    ("weight", "error", "message"),
    [
        ([[1.0]], TypeError, "weight must be a tensor, got list"),
        (torch.ones(2, 3, dtype=torch.int8), TypeError, "weight must be float32, .* or float64, got torch.int8"),
        (torch.ones(2, 3, dtype=torch.float8_e5m2), TypeError, "weight must be float32, .* got torch.float8_e5m2"),
        (torch.ones(3), ValueError, r"weight must be \[N, K\] with N and K of at least 1, got shape \(3,\)"),
        (torch.ones(1, 2, 3), ValueError, r"weight must be \[N, K\] .* got shape \(1, 2, 3\)"),
        (torch.ones(0, 3), ValueError, r"weight must be \[N, K\] .* got shape \(0, 3\)"),
        (torch.ones(3, 0), ValueError, r"weight must be \[N, K\] .* got shape \(3, 0\)"),
        (
            torch.tensor([[1.0, 2.0], [3.0, float("nan")]]),
            ValueError,
            "weight must be finite .* NaN or infinity in row 1",
        ),
        (torch.tensor([[float("-inf"), 2.0]]), ValueError, "weight must be finite .* in row 0"),
        (torch.tensor([[1e39]], dtype=torch.float64), ValueError, "weight must be finite in float32"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_quantised(weight: object, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^quantize_int8: {message}"):
        kernels.quantize_int8(weight)


@pytest.mark.parametrize("rows", [(), (1,), (3,), (20,), (2, 50)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_reference_is_the_definition(rows: tuple[int, ...], dtype: torch.dtype):
    x, weight, scale, bias = problem(rows, 48, 37, dtype)
    for b in (bias, bias.float(), None):
        y = reference.int8_linear(x, weight, scale, b)
        exact = by_definition(x, weight, scale, b)
        assert (y.dtype, y.shape) == (dtype, exact.shape)
        # half precision is rounded once, at the end
        ulps = 0.6 if dtype.itemsize == 2 else 8.0
        assert (y.double() - exact).abs().max() <= ulps * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*((m,) for m in range(1, 21)), (), (0,), (2, 1), (5, 13), (70,)], ids=str)
@pytest.mark.parametrize(("width", "outputs"), [(33, 101), (64, 70), (192, 5)])
def test_on_a_cpu(rows: tuple[int, ...], width: int, outputs: int, dtype: torch.dtype):
    """Widths that PyTorch's product takes and others; more rows than it is used for."""
    x, weight, scale, bias = problem(rows, width, outputs, dtype, CPU)
    for b in (bias, bias.float(), None):
        y = reference_cpu.int8_linear(x, weight, scale, b)
        assert y.is_contiguous()
        same_dtype = reference.int8_linear(x, weight, scale, b)
        assert_equal_to_oracle("y", y, same_dtype, by_definition(x, weight, scale, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_strides_do_not_matter(dtype: torch.dtype):
    x, weight, scale, bias = problem((3, 5), 128, 40, dtype, CPU)
    expected = reference_cpu.int8_linear(x, weight, scale, bias)
    spread = torch.full((5, 3, 256), float("nan"), dtype=dtype)
    other = spread[:, :, ::2].transpose(0, 1).copy_(x)
    transposed = weight.t().contiguous().t()
    twice = torch.stack((scale, scale), 1)[:, 0]
    assert torch.equal(reference_cpu.int8_linear(other, transposed, twice, bias), expected)


@pytest.mark.parametrize("weight_bytes", [1, 4 * 64 * 3, 2**21])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_in_parts_of_any_size(monkeypatch, dtype: torch.dtype, weight_bytes: int):
    monkeypatch.setattr(reference_cpu, "_WEIGHT_BYTES", weight_bytes)
    x, weight, scale, bias = problem((17,), 64, 20, dtype, CPU)
    same_dtype = reference.int8_linear(x, weight, scale, bias)
    y = reference_cpu.int8_linear(x, weight, scale, bias)
    assert_equal_to_oracle("y", y, same_dtype, by_definition(x, weight, scale, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_cpu_no_more_than_a_part_is_made_floating_numbers(dtype: torch.dtype):
    for rows in (1, 17):
        x, weight, scale, _ = problem((rows,), 256, 20_000, dtype, CPU)
        peak = peak_bytes(lambda x=x, weight=weight, scale=scale: reference_cpu.int8_linear(x, weight, scale), CPU)
        assert peak < 2**22 + 3 * rows * 20_000 * 4 < weight.numel() * 2
    assert peak_bytes(lambda: reference.int8_linear(x, weight, scale), CPU) > weight.numel() * 4


def test_on_a_cpu_pytorchs_product_is_called_where_it_is_fast_and_safe():
    """It reads past the end of rows that are no multiple of its vectors."""
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


def test_int8_linear_on_a_cpu_does_without_pytorchs_product(monkeypatch):
    monkeypatch.setattr(pytorch_internals, "has_int8pack_mm", lambda: False)
    x, weight, scale, bias = problem((1,), 64, 20, torch.bfloat16, CPU)
    same_dtype = reference.int8_linear(x, weight, scale, bias)
    y = reference_cpu.int8_linear(x, weight, scale, bias)
    assert_equal_to_oracle("y", y, same_dtype, by_definition(x, weight, scale, bias))


@pytest.mark.parametrize("function", [kernels.int8_linear, reference.int8_linear, reference_cpu.int8_linear])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [2, 40, 70])
def test_autocast_is_the_product_of_its_dtype(function, dtype: torch.dtype, rows: int):
    """And of no other within: float16 is multiplied in float32 on a CPU."""
    x, weight, scale, bias = problem((rows,), 64, 20, torch.float32)
    expected = function(x.to(dtype), weight, scale, bias)
    with torch.autocast(DEVICE.type, dtype):
        assert torch.equal(function(x, weight, scale, bias), expected)


@pytest.mark.parametrize("rows", [2, 40])
def test_on_a_cpu_compiling_changes_nothing(rows: int):
    x, weight, scale, bias = problem((rows,), 64, 20, torch.float32, CPU)
    compiled = torch.compile(reference_cpu.int8_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, scale, bias), reference_cpu.int8_linear(x, weight, scale, bias))


@pytest.mark.parametrize("function", [kernels.int8_linear, reference.int8_linear, reference_cpu.int8_linear])
def test_without_gradients_parameters_are_taken(function):
    x, weight, scale, bias = problem((2,), 64, 8, torch.float32)
    expected = function(x, weight, scale, bias)
    x.requires_grad_(), bias.requires_grad_()
    with pytest.raises(ValueError, match="x requires a gradient, but int8 weights are for inference"):
        function(x, weight, scale, bias)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = function(x, weight, scale, bias)
        assert torch.equal(y, expected)
        assert not y.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_multiplied_exactly(dtype: torch.dtype):
    """By each kernel: sums of products that float32 holds, of all integers from -128 to 127."""
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
def test_what_the_scale_makes_small_overflows_before_in_no_dtype(function, rows: int):
    x = torch.full((rows, 64), 1000.0, device=DEVICE, dtype=torch.float16)
    weight, scale = torch.full((3, 64), 127, dtype=torch.int8, device=DEVICE), torch.full((3,), 1e-3, device=DEVICE)
    torch.testing.assert_close(function(x, weight, scale), torch.full_like(x[:, :3], 8128.0), rtol=1e-3, atol=0)


def test_no_digit_of_float32_is_lost():
    """Matrix units multiply bfloat16: of numbers with 24 bits, against one that cancels all but the last."""
    x = torch.tensor([1 + 2**-23, 1.0, -1 - 2**-22, 3.141592653589793, 1e-30, -1e30], device=DEVICE)
    weight = torch.eye(6, dtype=torch.int8, device=DEVICE)
    for rows in (2, 17, 64):
        y = kernels.int8_linear(x.expand(rows, 6), weight, torch.ones(6, device=DEVICE))
        assert torch.equal(y, x.expand(rows, 6))


def recorded(rows: int, dtype: torch.dtype = torch.float32) -> list[str]:
    launches = []

    def run(kernel, *args, **kwargs):
        launches.append(getattr(kernel, "__name__", None) or kernel.fn.__name__)

    with patch.object(InterpretedFunction, "run", run), patch.object(JITFunction, "run", run):
        kernels.int8_linear(*problem((rows,), 32, 20, dtype))
    return launches


def test_which_kernel_multiplies_how_many_rows():
    assert recorded(1) == ["_int8_sums_kernel"]
    assert [recorded(rows) for rows in (2, 16, 17, 64)] == [["_int8_tiles_kernel"]] * 4
    assert recorded(65) == recorded(0) == []  # PyTorch's product, and nothing


def choices(rows: int, outputs: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[dict]:
    with tuning.assume_architecture("sm_90"):
        if rows == 1:
            return int8._ROW.candidates(CPU, outputs, width, dtype)
        return int8._ROWS.candidates(CPU, outputs, rows, dtype)


GPT2 = [(2304, 768), (768, 768), (3072, 768), (768, 3072), (50_257, 768), (4800, 1600), (1600, 6400)]


@pytest.mark.parametrize(("outputs", "width"), GPT2)
def test_one_row_occupies_every_processor_with_all_it_can_ask_for(outputs: int, width: int):
    first = choices(1, outputs, width)[0]
    assert runtime.cdiv(outputs, first["BN"]) >= 132
    # rows whole, or in as few pieces as registers allow
    assert first["BK"] >= min(width, 4096)
    on_their_way = runtime.cdiv(outputs, first["BN"]) * first["BN"] * min(first["BK"], width)
    assert on_their_way >= min(outputs * width, 132 * 26_000)
    # a load of 16 weights for each thread at least
    assert first["BN"] * first["BK"] >= 16 * 32 * first["num_warps"]


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize(("outputs", "width"), GPT2)
def test_tiles_are_as_wide_as_leaves_each_processor_one(outputs: int, width: int, rows: int):
    columns = choices(rows, outputs, width)[0]["BN"]
    assert columns == 16 or runtime.cdiv(outputs, columns) >= 132
    assert columns == 64 or runtime.cdiv(outputs, 2 * columns) < 132
    for dtype in DTYPES:
        for options in choices(rows, outputs, width, dtype):
            assert options["BM"] == rows
            assert options["BK"] >= 32
            assert (rows * dtype.itemsize + options["BN"]) * options["BK"] <= 24 * 1024  # of a pipeline's stage


def test_many_rows_take_the_memory_of_one_matrix():
    x, weight, scale, _ = problem((100,), 256, 1000, torch.bfloat16)
    peak = peak_bytes(lambda: kernels.int8_linear(x, weight, scale))
    # a CPU's product with another dtype for its result needs temporaries
    assert peak < 100 * 1000 * 2 + weight.numel() * (2 if DEVICE.type == "cuda" else 10) + 4096
    few = peak_bytes(lambda: kernels.int8_linear(x[:64], weight, scale))
    assert few < weight.numel() or DEVICE.type == "cpu"
