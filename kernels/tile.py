"""Device functions that several kernels share, and where kernels can be launched."""

import torch
import triton
import triton.language as tl

# TRITON_INTERPRET=1 has kernels executed on CPU tensors; Triton reads it when it is imported, and so does this
_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(_INTERPRETED)


def launchable(device: torch.device) -> bool:
    """Whether operators run as kernels on tensors of `device`. On the meta device they have shapes alone."""
    return device.type in ("cuda", "meta") or (_INTERPRETED and device.type == "cpu")


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a @ b in float32, for tiles a [M, K], b [K, N] and acc [M, N]."""
    if INTERPRETED:
        # the interpreter holds bf16 as raw integers and gets products of them silently wrong
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def matmul(
    a_ptr, b_ptr, rows, cols, n_rows, n_cols, n_inner,
    stride_a_row, stride_a_inner, stride_b_inner, stride_b_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The float32 tile (a @ b)[rows, cols] of a [n_rows, n_inner] and b [n_inner, n_cols], both by strides.

    Rows and columns past the end wrap around, so that no load needs a mask for them: their results are not stored.
    """
    inner = tl.arange(0, BK)
    p_a = a_ptr + (rows % n_rows)[:, None] * stride_a_row + inner[None, :].to(tl.int64) * stride_a_inner  # [BM, BK]
    p_b = b_ptr + inner[:, None].to(tl.int64) * stride_b_inner + (cols % n_cols)[None, :] * stride_b_col  # [BK, BN]
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for start in range(0, n_inner, BK):
        a = tl.load(p_a, mask=inner[None, :] < n_inner - start, other=0.0)
        b = tl.load(p_b, mask=inner[:, None] < n_inner - start, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        # strides that the compiler knows to be 1 are no tensors: cast takes both
        p_a += BK * tl.cast(stride_a_inner, tl.int64)
        p_b += BK * tl.cast(stride_b_inner, tl.int64)
    return acc


@triton.jit
def grouped_tile(n_rows, n_cols, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile of an [n_rows, n_cols] result, as int64 row and column indices [BM], [BN].

    Programs walk down GROUP tiles before they step right, so that those running together share operands in L2.
    """
    program = tl.program_id(0)
    row_tiles = tl.cdiv(n_rows, BM)
    group_size = GROUP * tl.cdiv(n_cols, BN)
    first_row = program // group_size * GROUP
    height = tl.minimum(row_tiles - first_row, GROUP)
    row_tile = first_row + program % group_size % height
    col_tile = program % group_size // height
    rows = row_tile.to(tl.int64) * BM + tl.arange(0, BM)
    cols = col_tile.to(tl.int64) * BN + tl.arange(0, BN)
    return rows, cols
