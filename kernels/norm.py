"""Layer norm (Ba et al. 2016, arXiv:1607.06450), alone and after a residual addition.

Every row is read once and written once. Each pass has two kernels: rows that fit into registers stay there, several to
a program where they are short. Longer rows are read twice in chunks, the second time from the L2 cache.

Tiles: b_x is the tile [BM, BN] of rows and columns of x [M, C], b_weight a block [BN] of the weight; all are float32.
h is what is normalised: x, or residual + dropout(x). x_hat = (h - mean) * rstd.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks, philox, reference, runtime, tile
from kernels.tuning import Config, Tunable
from kernels.workload import CodegenCase, WarmupCase, Workload


@triton.jit
def _load_h(
    x_ptr, residual_ptr, h_ptr, rows, first_col, mask, width, stride_x_row, stride_residual_row,
    seed, keep_threshold, dropout_scale, ADD: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Load the tile of h; residual + dropout(x) is also stored."""
    cols = first_col + tl.arange(0, BN)
    b_h = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        keep = philox.kept_elements(seed, rows, first_col, keep_threshold, BM, BN)
        b_h = tl.where(keep, b_h, 0.0) * dropout_scale
    if ADD:
        p_residual = residual_ptr + rows[:, None] * stride_residual_row + cols[None, :]
        b_h += tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
        b_stored = b_h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * width + cols[None, :], b_stored, mask=mask)
        b_h = b_stored.to(tl.float32)  # normalise the rounded sum, which the next layer reads
    return b_h


@triton.jit
def _load_columns(ptr, cols, width, PRESENT: tl.constexpr, ABSENT: tl.constexpr):
    """Load a block [BN] of a parameter; ABSENT fills in for a missing one."""
    if PRESENT:
        return tl.load(ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    else:
        return tl.full(cols.shape, ABSENT, tl.float32)


@triton.jit
def _layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    n_rows, width, stride_x_row, stride_residual_row, eps, keep_threshold, dropout_scale,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Normalise BM whole rows: BN >= width."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    seed = tl.load(seed_ptr) if DROPOUT else 0
    b_h = _load_h(
        x_ptr, residual_ptr, h_ptr, rows, 0, mask, width, stride_x_row, stride_residual_row,
        seed, keep_threshold, dropout_scale, ADD, DROPOUT, BM, BN,
    )  # fmt: skip  # [BM, BN]
    mean = tl.sum(b_h, axis=1) / width  # [BM]
    b_centred = tl.where(mask, b_h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, axis=1) / width + eps)  # [BM]
    b_weight = _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)  # [BN]
    b_bias = _load_columns(bias_ptr, cols, width, HAS_BIAS, 0.0)
    b_y = b_centred * rstd[:, None] * b_weight[None, :] + b_bias[None, :]
    tl.store(y_ptr + rows[:, None] * width + cols[None, :], b_y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _layer_norm_forward_chunked_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    n_rows, width, stride_x_row, stride_residual_row, eps, keep_threshold, dropout_scale,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Normalise one row (BM = 1) in chunks of BN columns: first the statistics, then y."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, BM)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    mean = tl.zeros([BM], dtype=tl.float32)
    squares = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        b_h = _load_h(
            x_ptr, residual_ptr, h_ptr, rows, start, mask, width, stride_x_row, stride_residual_row,
            seed, keep_threshold, dropout_scale, ADD, DROPOUT, BM, BN,
        )  # fmt: skip  # [1, BN]
        # merge the sums of centred squares (Chan et al. 1979): no cancellation
        count = tl.minimum(width - start, BN).to(tl.float32)
        chunk_mean = tl.sum(b_h, axis=1) / count
        b_centred = tl.where(mask, b_h - chunk_mean[:, None], 0.0)
        delta = chunk_mean - mean
        share = count / (start + count)
        squares += tl.sum(b_centred * b_centred, axis=1) + delta * delta * (start * share)
        mean += delta * share
    rstd = 1.0 / tl.sqrt(squares / width + eps)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        if ADD:
            p_h = h_ptr + rows[:, None] * width + cols[None, :]
        else:
            p_h = x_ptr + rows[:, None] * stride_x_row + cols[None, :]
        b_x_hat = (tl.load(p_h, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        b_weight = _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)  # [BN]
        b_bias = _load_columns(bias_ptr, cols, width, HAS_BIAS, 0.0)
        b_y = b_x_hat * b_weight[None, :] + b_bias[None, :]
        tl.store(y_ptr + rows[:, None] * width + cols[None, :], b_y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row):
    """Load the tiles of dy and x_hat."""
    b_h = tl.load(h_ptr + rows[:, None] * stride_h_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    b_dy = tl.load(dy_ptr + rows[:, None] * stride_dy_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return b_dy, tl.where(mask, (b_h - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def _store_gradients(
    b_dh, dh_ptr, dresidual_ptr, dx_ptr, rows, first_col, mask, width, stride_dh_row,
    seed, keep_threshold, dropout_scale,
    HAS_DH: tl.constexpr, DROPOUT: tl.constexpr, STORE_DX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add the gradient from other readers of h, and store the gradients of residual and x."""
    cols = first_col + tl.arange(0, BN)
    if HAS_DH:
        b_dh += tl.load(dh_ptr + rows[:, None] * stride_dh_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = rows[:, None] * width + cols[None, :]
    tl.store(dresidual_ptr + offsets, b_dh.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if STORE_DX:
        if DROPOUT:
            keep = philox.kept_elements(seed, rows, first_col, keep_threshold, BM, BN)
            b_dh = tl.where(keep, b_dh * dropout_scale, 0.0)
        tl.store(dx_ptr + offsets, b_dh.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(
    sums_ptr, b_dweight, b_dbias, cols, width, AXIS: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """Store this program's partial sums to [weight and bias, programs along AXIS, width]."""
    p_sums = sums_ptr + tl.program_id(AXIS).to(tl.int64) * width + cols
    if WEIGHT_GRADIENT:
        tl.store(p_sums, b_dweight, mask=cols < width)
        p_sums += tl.num_programs(AXIS).to(tl.int64) * width
    if BIAS_GRADIENT:
        tl.store(p_sums, b_dbias, mask=cols < width)


@triton.jit
def _layer_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dresidual_ptr, dx_ptr, sums_ptr,
    n_rows, width, stride_dy_row, stride_dh_row, stride_h_row, keep_threshold, dropout_scale,
    HAS_DH: tl.constexpr, DROPOUT: tl.constexpr, STORE_DX: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Differentiate blocks of BM whole rows in a persistent program, which keeps partial sums for weight and bias."""
    cols = tl.arange(0, BN)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    b_weight = _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)  # [BN]
    b_dweight = tl.zeros([BN], dtype=tl.float32)
    b_dbias = tl.zeros([BN], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BM), tl.num_programs(0)):
        rows = (block + tl.zeros([BM], dtype=tl.int64)) * BM + tl.arange(0, BM)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        b_dy, b_x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        b_dx_hat = b_dy * b_weight[None, :]
        # subtract the projections of dx_hat on 1 and on x_hat
        along_one = tl.sum(b_dx_hat, axis=1) / width  # [BM]
        along_x_hat = tl.sum(b_dx_hat * b_x_hat, axis=1) / width  # [BM]
        b_dh = (b_dx_hat - along_one[:, None] - b_x_hat * along_x_hat[:, None]) * rstd[:, None]  # [BM, BN]
        _store_gradients(
            b_dh, dh_ptr, dresidual_ptr, dx_ptr, rows, 0, mask, width, stride_dh_row,
            seed, keep_threshold, dropout_scale, HAS_DH, DROPOUT, STORE_DX, BM, BN,
        )  # fmt: skip
        if WEIGHT_GRADIENT:
            b_dweight += tl.sum(b_dy * b_x_hat, axis=0)
        if BIAS_GRADIENT:
            b_dbias += tl.sum(b_dy, axis=0)
    _store_sums(sums_ptr, b_dweight, b_dbias, cols, width, 0, WEIGHT_GRADIENT, BIAS_GRADIENT)


@triton.jit
def _layer_norm_backward_chunked_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr, dresidual_ptr, dx_ptr, sums_ptr,
    n_rows, width, stride_dy_row, stride_dh_row, stride_h_row, keep_threshold, dropout_scale,
    HAS_DH: tl.constexpr, DROPOUT: tl.constexpr, STORE_DX: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Differentiate one row (BM = 1) in chunks of BN columns: first both projections, then the gradients."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, BM)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    mean = tl.load(mean_ptr + rows)
    rstd = tl.load(rstd_ptr + rows)
    along_one = tl.zeros([BM], dtype=tl.float32)
    along_x_hat = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        b_dy, b_x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        b_dx_hat = b_dy * _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)[None, :]
        along_one += tl.sum(b_dx_hat, axis=1)
        along_x_hat += tl.sum(b_dx_hat * b_x_hat, axis=1)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        b_dy, b_x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        b_dx_hat = b_dy * _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)[None, :]
        b_dh = (b_dx_hat - (along_one / width)[:, None] - b_x_hat * (along_x_hat / width)[:, None]) * rstd[:, None]
        _store_gradients(
            b_dh, dh_ptr, dresidual_ptr, dx_ptr, rows, start, mask, width, stride_dh_row,
            seed, keep_threshold, dropout_scale, HAS_DH, DROPOUT, STORE_DX, BM, BN,
        )  # fmt: skip


@triton.jit
def _layer_norm_parameters_kernel(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, sums_ptr, n_rows, width, rows_per_program, stride_dy_row, stride_h_row,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of weight and bias over `rows_per_program` rows, for a block of BN columns."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    b_dweight = tl.zeros([BN], dtype=tl.float32)
    b_dbias = tl.zeros([BN], dtype=tl.float32)
    for start in range(0, rows_per_program, BM):
        rows = first + start + tl.arange(0, BM)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        b_dy, b_x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        if WEIGHT_GRADIENT:
            b_dweight += tl.sum(b_dy * b_x_hat, axis=0)
        if BIAS_GRADIENT:
            b_dbias += tl.sum(b_dy, axis=0)
    _store_sums(sums_ptr, b_dweight, b_dbias, cols, width, 1, WEIGHT_GRADIENT, BIAS_GRADIENT)


# the widest row that fits into the registers of a program; the backward of dropout also needs them for random numbers
_WIDEST, _WIDEST_DROPOUT_BACKWARD = 8192, 4096


def _warp_size(architecture: str) -> int:
    return 64 if architecture.startswith("gfx") else 32


def _blocks(architecture: str, width: int, elements: int, per_thread: int = 16, fewest: int = 4) -> dict[str, int]:
    """Return whole rows of about `elements` numbers per tensor, and at least `fewest` warps."""
    columns = runtime.next_power_of_2(width)
    rows = max(1, min(32, elements // columns))
    warps = rows * columns // (per_thread * _warp_size(architecture))
    return {"BM": rows, "BN": columns, "num_warps": min(16, max(fewest, warps))}


def _chunks(architecture: str, width: int) -> list[Config]:
    """Return the configurations that read a row in several chunks."""
    return [
        {"BM": 1, "BN": columns, "num_warps": columns // (8 * _warp_size(architecture))}
        for columns in (4096, 2048, 8192)
        if columns < width
    ]


def _forward_configs(architecture: str, width: int, dtype: torch.dtype, add: bool, dropout: bool) -> list[Config]:
    if width > _WIDEST:
        return _chunks(architecture, width)
    # On an H200 a multiprocessor reads and writes a row of 768 in 165 cycles. Its instructions issue in 204 cycles with
    # 16 numbers per thread, in 132 with 32.
    return [
        _blocks(architecture, width, 2048, per_thread=32, fewest=1),
        _blocks(architecture, width, 1024, per_thread=32, fewest=1),
        _blocks(architecture, width, 2048),
        _blocks(architecture, width, 4096),
    ]


def _backward_configs(architecture: str, width: int, dtype: torch.dtype, add: bool, dropout: bool) -> list[Config]:
    if width > (_WIDEST_DROPOUT_BACKWARD if dropout else _WIDEST):
        return _chunks(architecture, width)
    # as many programs as fit: at a width of 768 five, and seven with half the elements
    return [
        {**_blocks(architecture, width, 2048), "per_processor": 4},
        {**_blocks(architecture, width, 2048), "per_processor": 5},
        {**_blocks(architecture, width, 1024), "per_processor": 7},
    ]


_FORWARD = Tunable("layer_norm_forward", _forward_configs)
_BACKWARD = Tunable("layer_norm_backward", _backward_configs)
# only where rows are read in chunks; `sums` is the number of partial sums
_PARAMETERS = Tunable(
    "layer_norm_parameters",
    lambda architecture, width, dtype: [
        {"BM": 32, "BN": 128, "num_warps": 4, "sums": 32},
        {"BM": 16, "BN": 256, "num_warps": 4, "sums": 64},
    ],
)


def _rows(x: Tensor) -> Tensor:
    """Return x [..., C] as [M, C] with stride 1 along C; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    seed: Tensor | None, dropout_p: float, h: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y in `dtype`, and mean and rstd [M]. residual + dropout(x) is written to h."""
    rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    weight, bias = runtime.contiguous(weight), runtime.contiguous(bias)
    n_rows, width = rows.shape
    y, (mean, rstd) = torch.empty(x.shape, dtype=dtype, device=x.device), _statistics(x)

    def launch(config: Config) -> None:
        whole = config["BN"] >= width
        kernel = _layer_norm_forward_kernel if whole else _layer_norm_forward_chunked_kernel
        with runtime.on_device(x):
            kernel[(runtime.cdiv(n_rows, config["BM"]),)](
                rows, residual_rows, weight, bias, seed, y, h, mean, rstd,
                n_rows, width, rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0),
                eps, *philox.dropout_constants(dropout_p),
                ADD=residual is not None, DROPOUT=seed is not None, HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None, **config,
            )  # fmt: skip

    if n_rows > 0:
        _FORWARD.launch(launch, x.device, width, x.dtype, residual is not None, seed is not None)
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    weight_gradient: bool, bias_gradient: bool, seed: Tensor | None, dropout_p: float,
    dresidual: Tensor, dx: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write dresidual and dx. Return the requested gradients of weight and bias, [0 to 2, C] in float32."""
    dy, dh, h, weight = _rows(dy), None if dh is None else _rows(dh), _rows(h), runtime.contiguous(weight)
    n_rows, width = h.shape
    requested = {"WEIGHT_GRADIENT": weight_gradient, "BIAS_GRADIENT": bias_gradient}
    if n_rows == 0:
        return torch.zeros(sum(requested.values()), width, dtype=torch.float32, device=h.device)

    def launch(config: Config) -> Tensor:
        blocks = {name: config[name] for name in ("BM", "BN", "num_warps")}
        whole = blocks["BN"] >= width
        programs = runtime.cdiv(n_rows, blocks["BM"])
        if whole:
            programs = min(programs, runtime.program_count(h.device, config["per_processor"]))
        # partial sums of each program, added below in a fixed order: bitwise reproducible
        sums = h.new_empty(sum(requested.values()), programs if whole else 0, width, dtype=torch.float32)
        kernel = _layer_norm_backward_kernel if whole else _layer_norm_backward_chunked_kernel
        with runtime.on_device(h):
            kernel[(programs,)](
                dy, dh, h, weight, mean, rstd, seed, dresidual, dx, sums,
                n_rows, width, dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0),
                *philox.dropout_constants(dropout_p),
                HAS_DH=dh is not None, DROPOUT=seed is not None, STORE_DX=dx is not None,
                HAS_WEIGHT=weight is not None, **requested, **blocks,
            )  # fmt: skip
        return sums.sum(1) if whole else _parameter_gradients(dy, h, mean, rstd, requested)

    return _BACKWARD.launch(launch, h.device, width, h.dtype, dh is not None, seed is not None)


def _parameter_gradients(dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, requested: dict[str, bool]) -> Tensor:
    """Return the requested gradients of weight and bias, [0 to 2, C], by another pass over the rows [M, C]."""
    n_rows, width = h.shape
    if not any(requested.values()):
        return h.new_empty(0, width, dtype=torch.float32)

    def launch(config: Config) -> Tensor:
        blocks = {name: config[name] for name in ("BM", "BN", "num_warps")}
        programs = min(config["sums"], runtime.cdiv(n_rows, blocks["BM"]))
        sums = h.new_empty(sum(requested.values()), programs, width, dtype=torch.float32)
        with runtime.on_device(h):
            _layer_norm_parameters_kernel[(runtime.cdiv(width, blocks["BN"]), programs)](
                dy, h, mean, rstd, sums, n_rows, width,
                runtime.rows_per_program(n_rows, programs, blocks["BM"]),
                dy.stride(0), h.stride(0), **requested, **blocks,
            )  # fmt: skip
        return sums.sum(1)

    return _PARAMETERS.launch(launch, h.device, width, h.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _empty_parameter_gradients(x: Tensor, *requested: bool) -> Tensor:
    return x.new_empty(sum(requested), x.shape[-1], dtype=torch.float32)


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _cast_gradients(
    dparameters: Tensor, dtypes: tuple[torch.dtype | None, ...], requested: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of weight and bias in their dtypes, None where not requested."""
    rows = iter(dparameters)
    return tuple(next(rows).to(dtype) if needed else None for dtype, needed in zip(dtypes, requested, strict=True))


def _compute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, None, weight, bias, eps, None, 0.0, None, dtype)


_forward = torch.library.custom_op("gptfast::layer_norm", _compute, mutates_args=())


@_forward.register_fake
def _(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), *_statistics(x)


@torch.library.custom_op("gptfast::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, weight_gradient: bool, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return dx, and the requested gradients of weight and bias as rows [0 to 2, C] in float32."""
    dx, requested = torch.empty(x.shape, dtype=x.dtype, device=x.device), (weight_gradient, bias_gradient)
    return dx, _launch_backward(dy, None, x, weight, mean, rstd, *requested, None, 0.0, dx, None)


@_backward.register_fake
def _(dy, x, weight, mean, rstd, weight_gradient, bias_gradient):
    return x.new_empty(x.shape), _empty_parameter_gradients(x, weight_gradient, bias_gradient)


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.parameter_dtypes = _dtypes(weight, bias)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _dmean, _drstd):
    if dy is None:
        return None, None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    requested = ctx.needs_input_grad[1:3]
    dx, dparameters = _backward(dy, x, weight, mean, rstd, *requested)
    return dx, *_cast_gradients(dparameters, ctx.parameter_dtypes, requested), None, None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _add_compute(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, eps: float,
    dropout_p: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    h = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    y, mean, rstd = _launch_forward(x, residual, weight, bias, eps, seed, dropout_p, h, dtype)
    return y, h, mean, rstd


_add_forward = torch.library.custom_op("gptfast::add_layer_norm", _add_compute, mutates_args=())


@_add_forward.register_fake
def _(x, residual, weight, bias, seed, eps, dropout_p, dtype):
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return torch.empty_like(h, dtype=dtype), h, *_statistics(x)


@torch.library.custom_op("gptfast::add_layer_norm_backward", mutates_args=())
def _add_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, x_dtype: torch.dtype, residual_dtype: torch.dtype, weight_gradient: bool, bias_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return dresidual, dx, and the requested gradients of weight and bias as rows [0 to 2, C] in float32.

    dx is empty where it equals dresidual.
    """
    dresidual = torch.empty(h.shape, dtype=residual_dtype, device=h.device)
    dx = None if _shares_gradient(seed, x_dtype, residual_dtype) else torch.empty_like(dresidual, dtype=x_dtype)
    dparameters = _launch_backward(
        dy, dh, h, weight, mean, rstd, weight_gradient, bias_gradient, seed, dropout_p, dresidual, dx
    )
    return dresidual, h.new_empty(0) if dx is None else dx, dparameters


@_add_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, seed, dropout_p, x_dtype, residual_dtype, weight_gradient, bias_gradient):
    dresidual = h.new_empty(h.shape, dtype=residual_dtype)
    shared = _shares_gradient(seed, x_dtype, residual_dtype)
    dx = h.new_empty(0) if shared else h.new_empty(h.shape, dtype=x_dtype)
    return dresidual, dx, _empty_parameter_gradients(h, weight_gradient, bias_gradient)


def _shares_gradient(seed: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype) -> bool:
    return seed is None and x_dtype == residual_dtype


def _add_save_for_backward(ctx, inputs, output):
    x, residual, weight, bias, seed, _, ctx.dropout_p, _ = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(h, weight, mean, rstd, seed)
    ctx.dtypes = _dtypes(x, residual)
    ctx.parameter_dtypes = _dtypes(weight, bias)
    ctx.set_materialize_grads(False)


def _add_gradients(ctx, dy, dh, _dmean, _drstd):
    h, weight, mean, rstd, seed = ctx.saved_tensors
    if dy is None:  # y has no readers
        dy = torch.zeros_like(h)
    requested = ctx.needs_input_grad[2:4]
    dresidual, dx, dparameters = _add_backward(
        dy, dh, h, weight, mean, rstd, seed, ctx.dropout_p, *ctx.dtypes, *requested
    )
    dx = dresidual if _shares_gradient(seed, *ctx.dtypes) else dx
    return dx, dresidual, *_cast_gradients(dparameters, ctx.parameter_dtypes, requested), *(None,) * 4


_add_forward.register_autograd(_add_gradients, setup_context=_add_save_for_backward)


@reference.document_arguments
def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise each row: (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    x is read once and y, contiguous, is written once. Statistics and parameter gradients are in float32. A second
    derivative raises RuntimeError.
    """
    checks.layer_norm(x, weight, bias, eps, dtype)
    if not tile.launchable(x.device):
        return reference.layer_norm(x, weight, bias, eps, dtype)
    runtime.require_dtype("layer_norm", x)
    if dtype is None and _autocasts_to_float32(x):
        dtype = torch.float32
    forward = _compute if runtime.can_skip_dispatcher(x, weight, bias) else _forward
    y, _, _ = forward(x, weight, bias, float(eps), dtype or x.dtype)
    return y


def _autocasts_to_float32(x: Tensor) -> bool:
    return x.device.type == "cuda" and runtime.autocast_dtype(x.device) is not None


@reference.document_arguments
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Add a sublayer's output to the residual stream and normalise the sum, in one pass over memory.

    h = residual + dropout(x); y = layer_norm(h). The backward adds the gradient from other readers of h in the same
    pass. The dropout mask is a function of the seed and the element's position (Philox, Salmon et al. 2011): the
    backward recomputes it. y and h are contiguous. A second derivative raises RuntimeError.
    """
    checks.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)
    if not tile.launchable(x.device):
        return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)
    runtime.require_dtype("add_layer_norm", x)
    runtime.require_dtype("add_layer_norm", residual)
    if dtype is None and _autocasts_to_float32(x):
        residual = residual.float()
    seed = runtime.dropout_seed(dropout_p, seed, x.device)
    forward = _add_compute if runtime.can_skip_dispatcher(x, residual, weight, bias) else _add_forward
    dtype = dtype or torch.promote_types(x.dtype, residual.dtype)
    y, h, _, _ = forward(x, residual, weight, bias, seed, float(eps), float(dropout_p), dtype)
    return y, h


def codegen_cases(dtype: torch.dtype) -> Iterator[CodegenCase]:
    """GPT-2's width, and widths up to those that are read in chunks."""
    for width in (768, 4096, 8192, 65_536):
        case, x, w = f"layer_norm C={width}", torch.empty(64, width, dtype=dtype), torch.empty(width, dtype=dtype)
        mean = rstd = torch.empty(64, dtype=torch.float32)
        yield case, _forward, (x, w, w, 1e-5, dtype)
        yield case, _backward, (x, x, w, mean, rstd, True, True)
        for seed in (None, torch.zeros(1, dtype=torch.int64)):
            case = f"add_layer_norm C={width}" + ("" if seed is None else " dropout")
            yield case, _add_forward, (x, x, w, w, seed, 1e-5, 0.1, dtype)
            yield case, _add_backward, (x, x, x, w, mean, rstd, seed, 0.1, dtype, dtype, True, True)


def warmup_cases(workload: Workload) -> Iterator[WarmupCase]:
    """The norms of a block, and the last one of a model."""
    if workload.stage == "decode":  # a prefill of one token
        return
    model, matmul_dtype = workload.model, workload.matmul_dtype
    shape = (workload.batch_size, workload.length, model.n_embd)
    residual = workload.tensor(*shape, dtype=workload.residual_dtype)
    x = workload.tensor(*shape, dtype=matmul_dtype)
    parameters = (workload.tensor(model.n_embd), workload.tensor(model.n_embd) if model.bias else None)
    # norms before a matmul return its dtype
    dtype = matmul_dtype if model.norm_position == "pre" else None
    add = partial(add_layer_norm, x, residual, *parameters, dropout_p=workload.dropout_p, dtype=dtype)
    yield partial(layer_norm, residual, *parameters, dtype=dtype)
    yield add
    yield lambda: add()[0]  # no layer reads the last sum
