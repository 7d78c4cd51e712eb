"""Layer normalisation: one read and one write of each row forward, persistent programs backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import checks, reference, runtime, tile


@triton.jit
def _layer_norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, n_rows, width, x_row_stride, eps,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
    mean = tl.sum(x, axis=1) / width  # [BM]
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / width + eps)  # [BM]
    y = centred * rstd[:, None] * tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * width + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)


@triton.jit
def _layer_norm_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    n_rows, width, dy_row_stride, x_row_stride,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BN)
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)  # [BN]
    dweight = tl.zeros([BN], dtype=tl.float32)
    dbias = tl.zeros([BN], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(n_rows, BM), tl.num_programs(0)):
        rows = (block + tl.zeros([BM], dtype=tl.int64)) * BM + tl.arange(0, BM)
        mask = (rows < n_rows)[:, None] & (cols < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        x_hat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)  # [BM, BN]
        # dx is the gradient with respect to x_hat less its projections on 1 and on x_hat
        dx_hat = dy * weight[None, :]
        along_one = tl.sum(dx_hat, axis=1) / width  # [BM]
        along_x_hat = tl.sum(dx_hat * x_hat, axis=1) / width  # [BM]
        dx = (dx_hat - along_one[:, None] - x_hat * along_x_hat[:, None]) * rstd[:, None]
        tl.store(dx_ptr + rows[:, None] * width + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dweight += tl.sum(dy * x_hat, axis=0)
        if HAS_BIAS:
            dbias += tl.sum(dy, axis=0)
    partial = tl.program_id(0).to(tl.int64) * width + cols
    tl.store(dweight_ptr + partial, dweight, mask=cols < width)
    if HAS_BIAS:
        tl.store(dbias_ptr + partial, dbias, mask=cols < width)


def _blocks(width: int, elements: int) -> dict[str, int]:
    """Block shape and warps of a program that holds about `elements` numbers per tensor, whole rows always."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(32, elements // columns))
    return {"BM": rows, "BN": columns, "num_warps": min(32, max(4, rows * columns // 512))}


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [M, C] with contiguous rows; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("gptfast::layer_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(x)
    n_rows, width = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    blocks = _blocks(width, elements=4096)
    if n_rows > 0:
        with runtime.on_device(x):
            _layer_norm_forward_kernel[(triton.cdiv(n_rows, blocks["BM"]),)](
                rows, weight.contiguous(), None if bias is None else bias.contiguous(), y, mean, rstd,
                n_rows, width, rows.stride(0), eps, HAS_BIAS=bias is not None, **blocks,
            )  # fmt: skip
    return y, mean, rstd


@_forward.register_fake
def _(x, weight, bias, eps):
    statistics = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.custom_op("gptfast::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dy_rows, rows = _rows(dy), _rows(x)
    n_rows, width = rows.shape
    blocks = _blocks(width, elements=2048)
    programs = min(max(1, triton.cdiv(n_rows, blocks["BM"])), runtime.program_count(x.device, per_processor=8))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # one row per program, summed below in a fixed order: the same bits on every run
    dweight = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    dbias = torch.empty(programs if has_bias else 0, width, dtype=torch.float32, device=x.device)
    with runtime.on_device(x):
        _layer_norm_backward_kernel[(programs,)](
            dy_rows, rows, weight.contiguous(), mean, rstd, dx, dweight, dbias,
            n_rows, width, dy_rows.stride(0), rows.stride(0), HAS_BIAS=has_bias, **blocks,
        )  # fmt: skip
    return dx, dweight.sum(0), dbias.sum(0)


@_backward.register_fake
def _(dy, x, weight, mean, rstd, has_bias):
    dweight = x.new_empty(weight.shape, dtype=torch.float32)
    return x.new_empty(x.shape), dweight, torch.empty_like(dweight)


def _save_for_backward(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _dmean, _drstd):
    if dy is None:
        return None, None, None, None
    x, weight, mean, rstd = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, mean, rstd, ctx.bias_dtype is not None)
    return dx, dweight.to(weight.dtype), None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise each row: (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    One read and one write of x; statistics and parameter gradients in float32; bitwise the same on every run. Where
    Triton cannot run (CPU tensors), this is `kernels.reference.layer_norm`. Under CUDA's `torch.autocast` the result
    is float32, as PyTorch's is.

    Args:
        x: [..., C], C at most 65,536, float32, float16 or bfloat16, any strides.
        weight: [C].
        bias: [C] or None.
        eps: added to the (biased) variance, inside the root.

    Returns:
        [..., C], contiguous, in the dtype of x.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.layer_norm(x, weight, bias, eps)
    if not tile.launchable(x.device):
        return reference.layer_norm(x, weight, bias, eps)
    runtime.require_dtype("layer_norm", x)
    if x.shape[-1] > runtime.MAX_NORM_WIDTH:
        raise ValueError(f"layer_norm: the width of x must be at most {runtime.MAX_NORM_WIDTH}, got {x.shape[-1]}")
    if x.device.type == "cuda" and runtime.autocast_dtype(x.device) is not None:
        x = x.float()
    y, _, _ = _forward(x, weight, bias, float(eps))
    return y
