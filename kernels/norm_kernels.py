"""Device code of layer norm and of residual addition with layer norm, which is the same with one more input.

Two forms of each pass. Rows that fit into registers are read once and stay there, several to a program where they are
short. Longer rows are read in chunks, twice: the second time from the L2 cache, which holds the rows in progress.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import philox


@triton.jit
def _load_h(
    x_ptr, residual_ptr, h_ptr, rows, first_col, mask, width, stride_x_row, stride_residual_row,
    seed, threshold, grow, ADD: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The tile [BM, BN] that is normalised, in float32: x, or residual + dropout(x), which is stored as h."""
    cols = first_col + tl.arange(0, BN)
    h = tl.load(x_ptr + rows[:, None] * stride_x_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        kept = philox.kept_elements(seed, rows, first_col, threshold, BM, BN)
        h = tl.where(kept, h, 0.0) * grow
    if ADD:
        p_residual = residual_ptr + rows[:, None] * stride_residual_row + cols[None, :]
        h += tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
        stored = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + rows[:, None] * width + cols[None, :], stored, mask=mask)
        h = stored.to(tl.float32)  # the norm is of what the next layer reads
    return h


@triton.jit
def _load_columns(ptr, cols, width, PRESENT: tl.constexpr, ABSENT: tl.constexpr):
    """The elements [BN] of a parameter in float32, or what stands for one that is not there."""
    if PRESENT:
        values = tl.load(ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    else:
        values = tl.full(cols.shape, ABSENT, tl.float32)
    return values


@triton.jit
def _layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    n_rows, width, stride_x_row, stride_residual_row, eps, threshold, grow,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM rows a program, held whole: BN >= width."""
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    seed = tl.load(seed_ptr) if DROPOUT else 0
    h = _load_h(
        x_ptr, residual_ptr, h_ptr, rows, 0, mask, width, stride_x_row, stride_residual_row,
        seed, threshold, grow, ADD, DROPOUT, BM, BN,
    )  # fmt: skip  # [BM, BN]
    mean = tl.sum(h, axis=1) / width  # [BM]
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)  # [BM]
    weight = _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)  # [BN]
    bias = _load_columns(bias_ptr, cols, width, HAS_BIAS, 0.0)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + rows[:, None] * width + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _layer_norm_forward_chunked_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr,
    n_rows, width, stride_x_row, stride_residual_row, eps, threshold, grow,
    ADD: tl.constexpr, DROPOUT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row a program (BM = 1) in chunks of BN: statistics of all chunks, then the result."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, BM)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    mean = tl.zeros([BM], dtype=tl.float32)
    squares = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        h = _load_h(
            x_ptr, residual_ptr, h_ptr, rows, start, mask, width, stride_x_row, stride_residual_row,
            seed, threshold, grow, ADD, DROPOUT, BM, BN,
        )  # fmt: skip  # [1, BN]
        # sums of centred squares, merged chunk by chunk (Chan et al. 1979): nothing cancels
        count = tl.minimum(width - start, BN).to(tl.float32)
        chunk_mean = tl.sum(h, axis=1) / count
        centred = tl.where(mask, h - chunk_mean[:, None], 0.0)
        delta = chunk_mean - mean
        share = count / (start + count)
        squares += tl.sum(centred * centred, axis=1) + delta * delta * (start * share)
        mean += delta * share
    rstd = 1.0 / tl.sqrt(squares / width + eps)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        if ADD:
            p_h = h_ptr + rows[:, None] * width + cols[None, :]
        else:
            p_h = x_ptr + rows[:, None] * stride_x_row + cols[None, :]
        x_hat = (tl.load(p_h, mask=mask, other=0.0).to(tl.float32) - mean[:, None]) * rstd[:, None]
        weight = _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)  # [BN]
        bias = _load_columns(bias_ptr, cols, width, HAS_BIAS, 0.0)
        y = x_hat * weight[None, :] + bias[None, :]
        tl.store(y_ptr + rows[:, None] * width + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row):
    """The upstream gradient and the normalised rows, tiles [BM, BN] in float32."""
    h = tl.load(h_ptr + rows[:, None] * stride_h_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + rows[:, None] * stride_dy_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    return dy, tl.where(mask, (h - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def _store_gradients(
    dh, dh_ptr, dresidual_ptr, dx_ptr, rows, first_col, mask, width, stride_dh_row, seed, threshold, grow,
    HAS_DH: tl.constexpr, DROPOUT: tl.constexpr, STORE_DX: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of h, to which that of its other readers is added, and through the dropout that of x."""
    cols = first_col + tl.arange(0, BN)
    if HAS_DH:
        dh += tl.load(dh_ptr + rows[:, None] * stride_dh_row + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = rows[:, None] * width + cols[None, :]
    tl.store(dresidual_ptr + offsets, dh.to(dresidual_ptr.dtype.element_ty), mask=mask)
    if STORE_DX:
        if DROPOUT:
            kept = philox.kept_elements(seed, rows, first_col, threshold, BM, BN)
            dh = tl.where(kept, dh * grow, 0.0)
        tl.store(dx_ptr + offsets, dh.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(
    sums_ptr, dweight, dbias, cols, width, AXIS: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """This program's sums for weight and bias, each to its row of [weight and bias, programs along AXIS, width]."""
    p_sums = sums_ptr + tl.program_id(AXIS).to(tl.int64) * width + cols
    if WEIGHT_GRADIENT:
        tl.store(p_sums, dweight, mask=cols < width)
        p_sums += tl.num_programs(AXIS).to(tl.int64) * width
    if BIAS_GRADIENT:
        tl.store(p_sums, dbias, mask=cols < width)


@triton.jit
def _layer_norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dresidual_ptr, dx_ptr, sums_ptr,
    n_rows, width, stride_dy_row, stride_dh_row, stride_h_row, threshold, grow,
    HAS_DH: tl.constexpr, DROPOUT: tl.constexpr, STORE_DX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A persistent program walks over blocks of BM whole rows; its sums for weight and bias go to a row of its own."""
    cols = tl.arange(0, BN)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    weight = _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)  # [BN]
    dweight = tl.zeros([BN], dtype=tl.float32)
    dbias = tl.zeros([BN], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BM), tl.num_programs(0)):
        rows = (block + tl.zeros([BM], dtype=tl.int64)) * BM + tl.arange(0, BM)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        dy, x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        dx_hat = dy * weight[None, :]
        # the gradient with respect to x_hat less its projections on 1 and on x_hat
        along_one = tl.sum(dx_hat, axis=1) / width  # [BM]
        along_x_hat = tl.sum(dx_hat * x_hat, axis=1) / width  # [BM]
        dh = (dx_hat - along_one[:, None] - x_hat * along_x_hat[:, None]) * rstd[:, None]  # [BM, BN]
        _store_gradients(
            dh, dh_ptr, dresidual_ptr, dx_ptr, rows, 0, mask, width, stride_dh_row, seed, threshold, grow,
            HAS_DH, DROPOUT, STORE_DX, BM, BN,
        )  # fmt: skip
        if WEIGHT_GRADIENT:
            dweight += tl.sum(dy * x_hat, axis=0)
        if BIAS_GRADIENT:
            dbias += tl.sum(dy, axis=0)
    _store_sums(sums_ptr, dweight, dbias, cols, width, 0, WEIGHT_GRADIENT, BIAS_GRADIENT)


@triton.jit
def _layer_norm_backward_chunked_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, mean_ptr, rstd_ptr, seed_ptr,
    dresidual_ptr, dx_ptr, sums_ptr,
    n_rows, width, stride_dy_row, stride_dh_row, stride_h_row, threshold, grow,
    HAS_DH: tl.constexpr, DROPOUT: tl.constexpr, STORE_DX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One row a program (BM = 1) in chunks of BN: both projections, then the gradients."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, BM)
    seed = tl.load(seed_ptr) if DROPOUT else 0
    mean = tl.load(mean_ptr + rows)
    rstd = tl.load(rstd_ptr + rows)
    along_one = tl.zeros([BM], dtype=tl.float32)
    along_x_hat = tl.zeros([BM], dtype=tl.float32)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        dy, x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        dx_hat = dy * _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)[None, :]
        along_one += tl.sum(dx_hat, axis=1)
        along_x_hat += tl.sum(dx_hat * x_hat, axis=1)
    for start in range(0, width, BN):
        cols = start + tl.arange(0, BN)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        dy, x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        dx_hat = dy * _load_columns(weight_ptr, cols, width, HAS_WEIGHT, 1.0)[None, :]
        dh = (dx_hat - (along_one / width)[:, None] - x_hat * (along_x_hat / width)[:, None]) * rstd[:, None]
        _store_gradients(
            dh, dh_ptr, dresidual_ptr, dx_ptr, rows, start, mask, width, stride_dh_row, seed, threshold, grow,
            HAS_DH, DROPOUT, STORE_DX, BM, BN,
        )  # fmt: skip


@triton.jit
def _layer_norm_parameters_kernel(
    dy_ptr, h_ptr, mean_ptr, rstd_ptr, sums_ptr, n_rows, width, rows_per_program,
    stride_dy_row, stride_h_row,
    WEIGHT_GRADIENT: tl.constexpr, BIAS_GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias for a block of BN columns, summed over `rows_per_program` rows."""
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    dweight = tl.zeros([BN], dtype=tl.float32)
    dbias = tl.zeros([BN], dtype=tl.float32)
    for start in range(0, rows_per_program, BM):
        rows = first + start + tl.arange(0, BM)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        dy, x_hat = _load_backward_tile(dy_ptr, h_ptr, mean, rstd, rows, cols, mask, stride_dy_row, stride_h_row)
        if WEIGHT_GRADIENT:
            dweight += tl.sum(dy * x_hat, axis=0)
        if BIAS_GRADIENT:
            dbias += tl.sum(dy, axis=0)
    _store_sums(sums_ptr, dweight, dbias, cols, width, 1, WEIGHT_GRADIENT, BIAS_GRADIENT)
