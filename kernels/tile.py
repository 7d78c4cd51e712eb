"""Device functions that several kernels share, and the devices that kernels launch on.

Tiles: b_a [BM, BK] and b_b [BK, BN] are tiles of the operands of a @ b, acc [BM, BN] is a float32 accumulator.
"""

import torch
import triton
import triton.language as tl

# TRITON_INTERPRET=1 runs kernels on CPU tensors; Triton reads it on import
_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(_INTERPRETED)


def launchable(device: torch.device) -> bool:
    """Return True if operators launch kernels on `device`, or compute shapes on the meta device."""
    return device.type in ("cuda", "meta") or (_INTERPRETED and device.type == "cpu")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b in float32, for tiles a [M, K], b [K, N] and acc [M, N]."""
    if INTERPRETED:
        # the interpreter stores bf16 as integers, and its products are silently wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def matmul(
    a, b, row, col, n_rows, n_cols, n_inner,
    stride_a_row, stride_a_inner, stride_b_inner, stride_b_col,
    DESCRIPTORS: tl.constexpr, B_BY_COLUMNS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the float32 tile (a @ b)[row : row + BM, col : col + BN] of a [n_rows, n_inner] and b [n_inner, n_cols].

    a and b are pointers with strides, or descriptors if DESCRIPTORS; b's descriptor is of [n_cols, n_inner] if
    B_BY_COLUMNS.
    """
    if DESCRIPTORS:  # TMA copies whole tiles, with zeros past the end
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for start in range(0, n_inner, BK):
            b_a = a.load([row, start])  # [BM, BK]
            b_b = tl.trans(b.load([col, start])) if B_BY_COLUMNS else b.load([start, col])  # [BK, BN]
            acc = dot(b_a, b_b, acc, PRECISION)
    else:
        inner = tl.arange(0, BK)
        # rows and columns past the end wrap around, which saves the loads a mask: their results are not stored
        rows = ((row + tl.arange(0, BM)) % n_rows).to(tl.int64)
        cols = ((col + tl.arange(0, BN)) % n_cols).to(tl.int64)
        p_a = a + rows[:, None] * stride_a_row + inner[None, :].to(tl.int64) * stride_a_inner  # [BM, BK]
        p_b = b + inner[:, None].to(tl.int64) * stride_b_inner + cols[None, :] * stride_b_col  # [BK, BN]
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for start in range(0, n_inner, BK):
            b_a = tl.load(p_a, mask=inner[None, :] < n_inner - start, other=0.0)
            b_b = tl.load(p_b, mask=inner[:, None] < n_inner - start, other=0.0)
            acc = dot(b_a, b_b, acc, PRECISION)
            # a stride of 1 is a constant without .to(); tl.cast takes both
            p_a += BK * tl.cast(stride_a_inner, tl.int64)
            p_b += BK * tl.cast(stride_b_inner, tl.int64)
    return acc


@triton.jit
def grouped_tile(index, n_rows, n_cols, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return the first row and column of the tile `index` of an [n_rows, n_cols] result.

    Indices go down GROUP tiles before they step right, so that concurrent programs share operands in the L2 cache.
    """
    row_tiles = tl.cdiv(n_rows, BM)
    group_size = GROUP * tl.cdiv(n_cols, BN)
    first_row = index // group_size * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    row = (first_row + index % group_size % height) * BM
    col = index % group_size // height * BN
    return row, col


@triton.jit
def halves(values, BM: tl.constexpr, BN: tl.constexpr):
    """Split a tile [BM, BN] into its left and right halves [BM, BN / 2]."""
    return tl.split(tl.permute(tl.reshape(values, [BM, 2, BN // 2]), [0, 2, 1]))


@triton.jit
def _offsets(row, col, n_rows, n_cols, BM: tl.constexpr, BN: tl.constexpr):
    """Return offsets [BM, BN] of a tile of a contiguous [n_rows, n_cols], and the mask of its elements inside."""
    rows, cols = row + tl.arange(0, BM), col + tl.arange(0, BN)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return rows.to(tl.int64)[:, None] * n_cols + cols[None, :], mask


@triton.jit
def load(
    source, row, col, n_rows, n_cols, DESCRIPTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Load the tile [BM, BN] at (row, col) of a contiguous [n_rows, n_cols], zero outside."""
    if DESCRIPTOR:
        values = source.load([row, col])
    else:
        offsets, mask = _offsets(row, col, n_rows, n_cols, BM, BN)
        values = tl.load(source + offsets, mask=mask, other=0.0)
    return values


@triton.jit
def store(
    target, values, row, col, n_rows, n_cols, DESCRIPTOR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Store a tile [BM, BN] at (row, col) of a contiguous [n_rows, n_cols], in its dtype."""
    if DESCRIPTOR:
        target.store([row, col], values.to(target.dtype))
    else:
        offsets, mask = _offsets(row, col, n_rows, n_cols, BM, BN)
        tl.store(target + offsets, values.to(target.dtype.element_ty), mask=mask)
