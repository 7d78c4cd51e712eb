"""The kernels of a linear layer whose weights are int8, for few rows: they read each weight once.

Integers become floating numbers in registers, products are summed in float32, and the scale of each output multiplies
its sum once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels import tile


@triton.jit
def _scaled(acc, cols, n_cols, scale_ptr, bias_ptr, HAS_BIAS: tl.constexpr):
    """Sums [..., BN] of the outputs `cols` times their scales, plus their biases, in float32."""
    y = acc * tl.load(scale_ptr + cols, mask=cols < n_cols, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    return y


@triton.jit
def _int8_sums_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, n_cols, n_inner,
    HAS_BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BN outputs of one row, by multiplications and additions."""
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    p_weight = weight_ptr + cols[:, None] * n_inner + inner[None, :]  # [BN, BK]
    acc = tl.zeros([BN], dtype=tl.float32)
    for start in range(0, n_inner, BK):
        left = inner < n_inner - start
        # first: threads wait for each other to share x, and by then the weights are on their way
        weight = tl.load(p_weight + start, mask=(cols < n_cols)[:, None] & left[None, :], other=0)
        x = tl.load(x_ptr + start + inner, mask=left, other=0.0)  # [BK]
        acc += tl.sum(weight.to(tl.float32) * x.to(tl.float32)[None, :], axis=1)
    y = _scaled(acc, cols, n_cols, scale_ptr, bias_ptr, HAS_BIAS)
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty), mask=cols < n_cols)


@triton.jit
def _dot(x, weight, acc):
    """Return acc + x @ weight for tiles x [BM, BK] and weight [BK, BN] int8: integers to 127 are exact in any dtype.

    In float32, x is a sum of three bfloat16 numbers of 8 bits each, exactly, so that matrix units multiply it.
    """
    weight = weight.to(tl.float32)  # the interpreter makes no bfloat16 of an integer
    if x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        low = (x - middle.to(tl.float32)).to(tl.bfloat16)
        weight = weight.to(tl.bfloat16)
        acc = tile.dot(low, weight, acc, "ieee")
        acc = tile.dot(middle, weight, acc, "ieee")
        acc = tile.dot(high, weight, acc, "ieee")
    else:
        acc = tile.dot(x, weight.to(x.dtype), acc, "ieee")
    return acc


@triton.jit
def _int8_tiles_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, n_rows, n_cols, n_inner,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BN outputs of all rows, which are BM at most, by matrix units."""
    rows, inner = tl.arange(0, BM).to(tl.int64), tl.arange(0, BK)
    cols = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    p_x = x_ptr + rows[:, None] * n_inner + inner[None, :]  # [BM, BK]
    p_weight = weight_ptr + cols[None, :] * n_inner + inner[:, None]  # [BK, BN]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, n_inner, BK):
        left = inner < n_inner - start
        x = tl.load(p_x + start, mask=(rows < n_rows)[:, None] & left[None, :], other=0.0)
        weight = tl.load(p_weight + start, mask=left[:, None] & (cols < n_cols)[None, :], other=0)
        acc = _dot(x, weight, acc)
    y = _scaled(acc, cols[None, :], n_cols, scale_ptr, bias_ptr, HAS_BIAS)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(y_ptr + rows[:, None] * n_cols + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
