"""Linear layer with int8 weights, for decoding, which takes the time of reading the weights.

Three implementations. "sums", for one row: multiply-adds, with as many loads in flight as possible. "tiles", up to 64
rows: matrix units on int8 weights. "matmul", for more rows: the weights are dequantized once for PyTorch's matmul. The
first two read one byte a weight; the third moves five, which many rows hide.

Configurations: on an H200, 4.3 TB/s times a latency of 0.8 us are 3.4 MB in flight, 26 KB on each of 132 processors.
The matrices of a GPT-2 layer have 0.6 to 2.4 MB, so nearly all of a matrix must be in flight at once. The rules first
give each processor a program and then make tiles large: 8 KB of weights each, without a loop up to a width of 4096
("sums"), or with the next two tiles prefetched ("tiles"). Of the largest matrix, [50257, 768], a processor runs 7
programs of "sums" at once with 42 KB in flight, or 6 of "tiles" with 96 KB.

Tiles: b_x is [BM, BK] of x [M, K] ("tiles") or [BK] of its row ("sums"), b_weight [BK, BN] of weight [N, K]. b_acc sums
products in float32, and the scale of an output multiplies its sum once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.tuning import Config, Tunable
from kernels.workload import CodegenCase, WarmupCase, Workload


@triton.jit
def _scale_and_bias(b_acc, cols, n_cols, scale_ptr, bias_ptr, HAS_BIAS: tl.constexpr):
    """Sums [..., BN] of the outputs `cols`, times their scales, plus their biases, in float32."""
    b_y = b_acc * tl.load(scale_ptr + cols, mask=cols < n_cols, other=0.0)
    if HAS_BIAS:
        b_y += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    return b_y


@triton.jit
def _int8_sums_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, n_cols, n_inner,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute BN outputs of one row by multiply-adds."""
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    p_weight = weight_ptr + cols[:, None] * n_inner + inner[None, :]  # [BN, BK]
    b_acc = tl.zeros([BN], dtype=tl.float32)
    for start in range(0, n_inner, BK):
        left = inner < n_inner - start
        # weights first: threads synchronise to share x, and by then the weights are in flight
        b_weight = tl.load(p_weight + start, mask=(cols < n_cols)[:, None] & left[None, :], other=0)  # [BN, BK]
        b_x = tl.load(x_ptr + start + inner, mask=left, other=0.0)  # [BK]
        b_acc += tl.sum(b_weight.to(tl.float32) * b_x.to(tl.float32)[None, :], axis=1)
    b_y = _scale_and_bias(b_acc, cols, n_cols, scale_ptr, bias_ptr, HAS_BIAS)
    tl.store(y_ptr + cols, b_y.to(y_ptr.dtype.element_ty), mask=cols < n_cols)


@triton.jit
def _dot(b_x, b_weight, b_acc):
    """Return b_acc + b_x @ b_weight for tiles [BM, BK] and [BK, BN] int8, exact in any dtype.

    A float32 x is split into three bfloat16 parts of 8 bits each, without rounding, for the matrix units.
    """
    b_weight = b_weight.to(tl.float32)  # the interpreter cannot cast an integer to bfloat16
    if b_x.dtype == tl.float32:
        high = b_x.to(tl.bfloat16)
        b_x -= high.to(tl.float32)
        middle = b_x.to(tl.bfloat16)
        low = (b_x - middle.to(tl.float32)).to(tl.bfloat16)
        b_weight = b_weight.to(tl.bfloat16)
        b_acc = tile.dot(low, b_weight, b_acc, "ieee")
        b_acc = tile.dot(middle, b_weight, b_acc, "ieee")
        b_acc = tile.dot(high, b_weight, b_acc, "ieee")
    else:
        b_acc = tile.dot(b_x, b_weight.to(b_x.dtype), b_acc, "ieee")
    return b_acc


@triton.jit
def _int8_tiles_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, n_rows, n_cols, n_inner,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute BN outputs of all rows, at most BM, on matrix units."""
    rows, inner = tl.arange(0, BM).to(tl.int64), tl.arange(0, BK)
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    p_x = x_ptr + rows[:, None] * n_inner + inner[None, :]  # [BM, BK]
    p_weight = weight_ptr + cols[None, :] * n_inner + inner[:, None]  # [BK, BN]
    b_acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, n_inner, BK):
        left = inner < n_inner - start
        b_x = tl.load(p_x + start, mask=(rows < n_rows)[:, None] & left[None, :], other=0.0)  # [BM, BK]
        b_weight = tl.load(p_weight + start, mask=left[:, None] & (cols < n_cols)[None, :], other=0)  # [BK, BN]
        b_acc = _dot(b_x, b_weight, b_acc)
    b_y = _scale_and_bias(b_acc, cols[None, :], n_cols, scale_ptr, bias_ptr, HAS_BIAS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], b_y.to(y_ptr.dtype.element_ty), mask=mask)


_PROCESSORS = 132  # of an H200; other data-centre GPUs have about as many
_WEIGHTS = 8192  # in a tile
_MAX_INNER = 4096  # weights of a row that "sums" loads at once
_MAX_ROWS = 64  # of "tiles"


def _sums(outputs: int, width: int, weights: int) -> Config:
    """Whole rows of weights where they fit, as many as leave each processor a program."""
    inner = min(runtime.next_power_of_2(max(width, 16)), _MAX_INNER)
    columns = max(1, weights // inner)
    while columns > 1 and runtime.cdiv(outputs, columns) < _PROCESSORS:
        columns //= 2
    return {"BN": columns, "BK": inner, "num_warps": 4}


def _tiles(architecture: str, outputs: int, rows: int, dtype: torch.dtype, widest: int) -> Config:
    """As many outputs as leave each processor a program: wider tiles read x less often."""
    columns = widest
    while columns > 16 and runtime.cdiv(outputs, columns) < _PROCESSORS:
        columns //= 2
    inner = _WEIGHTS // max(columns, rows)
    if dtype == torch.float32:  # the three parts of x take registers
        inner = 32 if rows == columns == 64 else max(64, min(2048 // rows, 4096 // columns))
    return {
        "BM": rows, "BN": columns, "BK": inner, "num_warps": 2 if columns == 16 else 4,
        "num_stages": 2 if architecture.startswith("gfx") else 4,
    }  # fmt: skip


def _row_configs(architecture: str, outputs: int, width: int, dtype: torch.dtype) -> list[Config]:
    """One row: "sums", or "tiles" with 15 empty rows, which take less arithmetic for each weight."""
    sums = [_sums(outputs, width, weights) for weights in (_WEIGHTS, 2 * _WEIGHTS)]
    return [*sums, _tiles(architecture, outputs, 16, dtype, 64)]


def _rows_configs(architecture: str, outputs: int, rows: int, dtype: torch.dtype) -> list[Config]:
    return [_tiles(architecture, outputs, rows, dtype, widest) for widest in (64, 16)]


_ROW = Tunable("int8_row", _row_configs)
_ROWS = Tunable("int8_rows", _rows_configs)


def _compute(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    outputs, width = weight.shape
    shape = (*x.shape[:-1], outputs)
    n_rows = x.numel() // width
    if n_rows == 0:
        return x.new_empty(shape)
    if n_rows > _MAX_ROWS:
        dequantized = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        torch.mul(weight, scale[:, None], out=dequantized)  # multiplied in float32, rounded once
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x.reshape(-1, width), dequantized, bias).view(shape)
    x, weight, scale, bias = x.contiguous(), weight.contiguous(), scale.contiguous(), runtime.contiguous(bias)
    y = x.new_empty(shape)

    def run(config: Config) -> None:
        tiles = "BM" in config
        kernel = _int8_tiles_kernel if tiles else _int8_sums_kernel
        sizes = (n_rows, outputs, width) if tiles else (outputs, width)
        with runtime.on_device(x):
            kernel[(runtime.cdiv(outputs, config["BN"]),)](
                x, weight, scale, bias, y, *sizes, HAS_BIAS=bias is not None, **config
            )

    if n_rows == 1:
        _ROW.launch(run, x.device, outputs, width, x.dtype)
    else:  # row counts that take the same tile share a configuration
        _ROWS.launch(run, x.device, outputs, max(16, runtime.next_power_of_2(n_rows)), x.dtype)
    return y


_forward = torch.library.custom_op("gptfast::int8_linear", _compute, mutates_args=())


@_forward.register_fake
def _(x, weight, scale, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@register_flop_formula(torch.ops.gptfast.int8_linear)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


@reference.document_arguments
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute (x @ weight.T) * scale + bias with int8 weights from `kernels.quantize_int8`.

    For generation, without a derivative. One row takes the time of reading its weights, at one byte each half of
    bfloat16's. x is not quantized: this is weight-only quantization, "W8A16" (Frantar et al. 2022, arXiv:2210.17323,
    with 4 bits). Up to 64 rows run in kernels that read int8 and whose products are exact in float32 before they are
    added. For more rows the weights are dequantized to the dtype of x, with rounding, for PyTorch's matmul. The
    result is contiguous.
    """
    checks.int8_linear(x, weight, scale, bias)
    if not tile.launchable(x.device):
        return reference.int8_linear(x, weight, scale, bias)
    runtime.require_dtype("int8_linear", x)
    dtype = runtime.autocast_dtype(x.device)
    if dtype is not None:
        x = x.to(dtype)
    forward = _compute if runtime.can_skip_dispatcher(x, weight, scale, bias) else _forward
    return forward(x, weight, scale, bias)


def codegen_cases(dtype: torch.dtype) -> Iterator[CodegenCase]:
    """Layers of GPT-2 and GPT-2 XL and the output layer, for one row and for each tile of rows."""
    for outputs, width in ((768, 3072), (6400, 1600), (50_257, 768)):
        weight, scale = torch.empty(outputs, width, dtype=torch.int8), torch.empty(outputs, dtype=torch.float32)
        for rows in (1, 16, 32, 64):
            x, bias = torch.empty(rows, width, dtype=dtype), torch.empty(outputs, dtype=dtype)
            yield f"int8_linear N={outputs} K={width} M={rows}", _compute, (x, weight, scale, bias)


def warmup_cases(workload: Workload) -> Iterator[WarmupCase]:
    """Every linear layer, for as many rows as the kernels take."""
    if workload.stage != "decode" or not workload.int8:
        return
    model, width = workload.model, workload.model.n_embd
    layers = (  # outputs, inputs, has a bias
        (3 * width, width, model.has_qkv_bias),
        (width, width, model.bias),
        (4 * width, width, model.bias),
        (width, 4 * width, model.bias),
        (model.padded_vocab_size, width, False),
    )
    for outputs, inputs, has_bias in layers:
        weight, scale = reference.quantize_int8(workload.tensor(outputs, inputs).detach())
        bias = workload.tensor(outputs).detach() if has_bias else None
        # a tile holds 16, 32 or 64 rows; Triton compiles for multiples of 16, for others, and for 1
        for rows in (1, 2, 16, 17, 32, 33, 64):
            yield partial(int8_linear, workload.tensor(rows, inputs, dtype=workload.matmul_dtype), weight, scale, bias)
