"""Device code of the feed-forward: products with the activation in their epilogue, and the activation alone."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import tile

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_LOG2_E = tl.constexpr(1.4426950408889634)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gate(z):
    """0.5 * (1 + tanh(u)) of GELU, which is sigmoid(2u): the interpreter has no tanh.

    With exp2, which is one instruction; tl.exp is five.
    """
    slope = -_TWICE_SQRT_2_OVER_PI * _LOG2_E
    cubic = slope * _CUBIC
    return 1.0 / (1.0 + tl.exp2(z * (slope + cubic * (z * z))))


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """The activation of z in float32."""
    if ACTIVATION == "relu":
        h = tl.maximum(z, 0.0)
    elif ACTIVATION == "gelu":
        h = 0.5 * z * (1.0 + tl.erf(z * _SQRT_HALF))
    else:
        h = z * _gate(z)
    return h


@triton.jit
def _activate_with_slope(z, ACTIVATION: tl.constexpr):
    """The activation of z in float32, and its derivative."""
    if ACTIVATION == "relu":
        h, slope = tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        h, slope = z * cdf, cdf + z * _INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    else:
        gate = _gate(z)
        h = z * gate
        du = (1.0 + 3.0 * _CUBIC * z * z) * _TWICE_SQRT_2_OVER_PI
        slope = gate + h * (1.0 - gate) * du
    return h, slope


@triton.jit
def _store_up(
    acc, row, col, b_ptr, h, z, n_rows, n_hidden,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile [BM, BN] of x @ w.T: the bias, z, and the activation."""
    cols = col + tl.arange(0, BN)
    if HAS_BIAS:
        acc += tl.load(b_ptr + cols, mask=cols < n_hidden, other=0.0).to(tl.float32)[None, :]
    if SAVE_Z:
        tile.store(z, acc, row, col, n_rows, n_hidden, DESCRIPTORS, BM, BN)
    tile.store(h, _activate(acc, ACTIVATION), row, col, n_rows, n_hidden, DESCRIPTORS, BM, BN)


@triton.jit
def _up_tile(
    index, x, w, b_ptr, h, z, n_rows, n_hidden, width,
    stride_x_row, stride_x_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, col = tile.grouped_tile(index, n_rows, n_hidden, BM, BN, GROUP)
    acc = tile.matmul(
        x, w, row, col, n_rows, n_hidden, width, stride_x_row, stride_x_col, stride_w_col, stride_w_row,
        DESCRIPTORS, True, BM, BN, BK, PRECISION,
    )  # [BM, BN]  # fmt: skip
    if PARTS == 2:
        left, right = tile.halves(acc, BM, BN)  # [BM, BN / 2] each
        _store_up(
            left, row, col, b_ptr, h, z, n_rows, n_hidden,
            ACTIVATION, HAS_BIAS, SAVE_Z, DESCRIPTORS, BM, BN // 2,
        )  # fmt: skip
        _store_up(
            right, row, col + BN // 2, b_ptr, h, z, n_rows, n_hidden,
            ACTIVATION, HAS_BIAS, SAVE_Z, DESCRIPTORS, BM, BN // 2,
        )  # fmt: skip
    else:
        _store_up(
            acc, row, col, b_ptr, h, z, n_rows, n_hidden, ACTIVATION, HAS_BIAS, SAVE_Z, DESCRIPTORS, BM, BN,
        )  # fmt: skip


@triton.jit
def _ffn_up_kernel(
    x, w, b_ptr, h, z, n_rows, n_hidden, width,
    stride_x_row, stride_x_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Write z = x @ w.T + b [n_rows, n_hidden] and h = activation(z), the epilogue in PARTS of a tile.

    With descriptors a program walks over tiles, the next one's operands on their way while one is written. With
    pointers it has a single tile: a loop around their arithmetic costs dozens of registers.
    """
    tiles = tl.cdiv(n_rows, BM) * tl.cdiv(n_hidden, BN)
    if DESCRIPTORS:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _up_tile(
                index, x, w, b_ptr, h, z, n_rows, n_hidden, width,
                stride_x_row, stride_x_col, stride_w_row, stride_w_col,
                ACTIVATION, HAS_BIAS, SAVE_Z, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
            )  # fmt: skip
    else:
        _up_tile(
            tl.program_id(0), x, w, b_ptr, h, z, n_rows, n_hidden, width,
            stride_x_row, stride_x_col, stride_w_row, stride_w_col,
            ACTIVATION, HAS_BIAS, SAVE_Z, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
        )  # fmt: skip


@triton.jit
def _store_down_backward(
    dh, row, col, z, dz, h, sums_ptr, n_rows, n_hidden,
    ACTIVATION: tl.constexpr, STORE_H: tl.constexpr, BIAS_GRADIENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile [BM, BN] of dy @ w: h and dz from z, and the tile's share of the bias's gradient."""
    pre = tile.load(z, row, col, n_rows, n_hidden, DESCRIPTORS, BM, BN).to(tl.float32)  # [BM, BN]
    post, slope = _activate_with_slope(pre, ACTIVATION)
    if STORE_H:
        tile.store(h, post, row, col, n_rows, n_hidden, DESCRIPTORS, BM, BN)
    gradient = dh * slope
    tile.store(dz, gradient, row, col, n_rows, n_hidden, DESCRIPTORS, BM, BN)
    if BIAS_GRADIENT:
        if not DESCRIPTORS:  # rows past the end were read from the start
            gradient = tl.where((row + tl.arange(0, BM) < n_rows)[:, None], gradient, 0.0)
        cols = col + tl.arange(0, BN)
        p_sums = sums_ptr + (row // BM).to(tl.int64) * n_hidden + cols
        tl.store(p_sums, tl.sum(gradient, axis=0), mask=cols < n_hidden)


@triton.jit
def _down_backward_tile(
    index, dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
    stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, STORE_H: tl.constexpr, BIAS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, col = tile.grouped_tile(index, n_rows, n_hidden, BM, BN, GROUP)
    dh = tile.matmul(
        dy, w, row, col, n_rows, n_hidden, width, stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
        DESCRIPTORS, False, BM, BN, BK, PRECISION,
    )  # [BM, BN]  # fmt: skip
    if PARTS == 2:
        left, right = tile.halves(dh, BM, BN)  # [BM, BN / 2] each
        _store_down_backward(
            left, row, col, z, dz, h, sums_ptr, n_rows, n_hidden,
            ACTIVATION, STORE_H, BIAS_GRADIENT, DESCRIPTORS, BM, BN // 2,
        )  # fmt: skip
        _store_down_backward(
            right, row, col + BN // 2, z, dz, h, sums_ptr, n_rows, n_hidden,
            ACTIVATION, STORE_H, BIAS_GRADIENT, DESCRIPTORS, BM, BN // 2,
        )  # fmt: skip
    else:
        _store_down_backward(
            dh, row, col, z, dz, h, sums_ptr, n_rows, n_hidden, ACTIVATION, STORE_H, BIAS_GRADIENT, DESCRIPTORS, BM, BN,
        )  # fmt: skip


@triton.jit
def _ffn_down_backward_kernel(
    dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
    stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, STORE_H: tl.constexpr, BIAS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Write dz = (dy @ w) * activation'(z) [n_rows, n_hidden], h = activation(z) for the gradient of w, and sums of dz.

    Walks over tiles as `_ffn_up_kernel`. Each tile's sums of dz over its rows go to a row of their own.
    """
    tiles = tl.cdiv(n_rows, BM) * tl.cdiv(n_hidden, BN)
    if DESCRIPTORS:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _down_backward_tile(
                index, dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
                stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
                ACTIVATION, STORE_H, BIAS_GRADIENT, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
            )  # fmt: skip
    else:
        _down_backward_tile(
            tl.program_id(0), dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
            stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
            ACTIVATION, STORE_H, BIAS_GRADIENT, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
        )  # fmt: skip


@triton.jit
def _activation_kernel(z_ptr, h_ptr, n_elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Write h = activation(z), both contiguous; they may be the same memory."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + elements, mask=elements < n_elements, other=0.0).to(tl.float32)  # [BLOCK]
    h = _activate(z, ACTIVATION)
    tl.store(h_ptr + elements, h.to(h_ptr.dtype.element_ty), mask=elements < n_elements)


@triton.jit
def _activation_backward_kernel(
    dh_ptr, z_ptr, dz_ptr, h_ptr, sums_ptr, n_rows, n_hidden, rows_per_program,
    ACTIVATION: tl.constexpr, STORE_H: tl.constexpr, BIAS_GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dz = dh * activation'(z) and h = activation(z), [n_rows, n_hidden] each, and sums of dz over rows.

    dz may be the memory of dh. A program walks down `rows_per_program` rows of BN columns; its sums have their own row.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    sums = tl.zeros([BN], dtype=tl.float32)
    for start in range(0, rows_per_program, BM):
        rows = first + start + tl.arange(0, BM)
        mask = (rows < n_rows)[:, None] & (cols < n_hidden)[None, :]
        offsets = rows[:, None] * n_hidden + cols[None, :]
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        dh = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        h, slope = _activate_with_slope(z, ACTIVATION)
        dz = dh * slope
        if STORE_H:
            tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if BIAS_GRADIENT:
            sums += tl.sum(dz, axis=0)
    if BIAS_GRADIENT:
        tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * n_hidden + cols, sums, mask=cols < n_hidden)
