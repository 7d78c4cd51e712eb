"""Layer norm, alone and with the residual addition before it: one read and one write of each row."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels import checks, reference, runtime, tile
from kernels.norm_kernels import (
    _layer_norm_backward_chunked_kernel,
    _layer_norm_backward_kernel,
    _layer_norm_forward_chunked_kernel,
    _layer_norm_forward_kernel,
    _layer_norm_parameters_kernel,
)

# widest row that the registers of a program hold; longer ones are read in chunks. The backward of dropout draws its
# numbers anew, beside all else that it holds.
_WIDEST, _WIDEST_DROPOUT_BACKWARD = 8192, 4096
_CHUNKED = {"BM": 1, "BN": 4096, "num_warps": 16}
_PARAMETERS = {"BM": 32, "BN": 128, "num_warps": 4}
_CHUNKED_SUMS = 32  # rows of partial sums; the columns make for enough programs


def _blocks(width: int, elements: int) -> dict[str, int]:
    """Block shape and warps of a program that holds about `elements` numbers per tensor, whole rows always."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(32, elements // columns))
    return {"BM": rows, "BN": columns, "num_warps": max(4, rows * columns // 512)}


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [M, C] with contiguous rows; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    seed: Tensor | None, dropout_p: float, h: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, mean and 1 / standard deviation of each row of x, or of residual + dropout(x), which is written to h."""
    rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    n_rows, width = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype if h is None else h.dtype, device=x.device)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    whole = width <= _WIDEST
    kernel = _layer_norm_forward_kernel if whole else _layer_norm_forward_chunked_kernel
    blocks = _blocks(width, elements=4096) if whole else _CHUNKED
    if n_rows > 0:
        with runtime.on_device(x):
            kernel[(triton.cdiv(n_rows, blocks["BM"]),)](
                rows, residual_rows, _contiguous(weight), _contiguous(bias), seed, y, h, mean, rstd,
                n_rows, width, rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), eps, dropout_p,
                ADD=residual is not None, DROPOUT=seed is not None, HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None, **blocks,
            )  # fmt: skip
    return y, mean, rstd


def _launch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool,
    seed: Tensor | None, dropout_p: float, dresidual: Tensor, dx: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradients of the rows; return those of weight and bias in float32, empty where there is none."""
    dy_rows, dh_rows, h_rows = _rows(dy), None if dh is None else _rows(dh), _rows(h)
    n_rows, width = h_rows.shape
    has_weight = weight is not None
    whole = width <= (_WIDEST if seed is None else _WIDEST_DROPOUT_BACKWARD)
    blocks = _blocks(width, elements=2048) if whole else _CHUNKED
    # partial sums, one row per program, added below in a fixed order: the same bits on every run
    sums = runtime.program_count(h.device, per_processor=8) if whole else _CHUNKED_SUMS
    sums = min(sums, triton.cdiv(n_rows, blocks["BM"] if whole else _PARAMETERS["BM"]))  # none of no rows: zeros
    dweight = torch.empty(sums if has_weight else 0, width, dtype=torch.float32, device=h.device)
    dbias = torch.empty(sums if has_bias else 0, width, dtype=torch.float32, device=h.device)
    tensors = (dy_rows, dh_rows, h_rows, _contiguous(weight), mean, rstd, seed, dresidual, dx)
    sizes = (
        n_rows, width, dy_rows.stride(0), 0 if dh_rows is None else dh_rows.stride(0), h_rows.stride(0), dropout_p,
    )  # fmt: skip
    flags = {
        "HAS_DH": dh is not None,
        "DROPOUT": seed is not None,
        "STORE_DX": dx is not None,
        "HAS_WEIGHT": has_weight,
    }
    if n_rows == 0:
        return dweight.sum(0), dbias.sum(0)
    with runtime.on_device(h):
        if whole:
            _layer_norm_backward_kernel[(sums,)](*tensors, dweight, dbias, *sizes, **flags, HAS_BIAS=has_bias, **blocks)
        else:
            _layer_norm_backward_chunked_kernel[(n_rows,)](*tensors, *sizes, **flags, **blocks)
            _launch_parameters(dy_rows, h_rows, mean, rstd, dweight, dbias, sums)
    return dweight.sum(0), dbias.sum(0)


def _launch_parameters(
    dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, dweight: Tensor, dbias: Tensor, sums: int
) -> None:
    n_rows, width = h.shape
    rows_per_program = triton.cdiv(triton.cdiv(n_rows, sums), _PARAMETERS["BM"]) * _PARAMETERS["BM"]
    _layer_norm_parameters_kernel[(triton.cdiv(width, _PARAMETERS["BN"]), sums)](
        dy, h, mean, rstd, dweight, dbias, n_rows, width, rows_per_program, dy.stride(0), h.stride(0),
        HAS_WEIGHT=dweight.shape[0] > 0, HAS_BIAS=dbias.shape[0] > 0, **_PARAMETERS,
    )  # fmt: skip


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _parameter_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    return x.new_empty(width, dtype=torch.float32), x.new_empty(width, dtype=torch.float32)


@torch.library.custom_op("gptfast::layer_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, None, weight, bias, eps, None, 0.0, None)


@_forward.register_fake
def _(x, weight, bias, eps):
    return x.new_empty(x.shape), *_statistics(x)


@torch.library.custom_op("gptfast::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, *_launch_backward(dy, None, x, weight, mean, rstd, has_bias, None, 0.0, dx, None)


@_backward.register_fake
def _(dy, x, weight, mean, rstd, has_bias):
    return x.new_empty(x.shape), *_parameter_gradients(x)


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
    return dx, *_in_dtypes(weight, ctx.bias_dtype, dweight, dbias), None


def _in_dtypes(
    weight: Tensor | None, bias_dtype: torch.dtype | None, dweight: Tensor, dbias: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias in the dtypes of these, None for what was absent."""
    return None if weight is None else dweight.to(weight.dtype), None if bias_dtype is None else dbias.to(bias_dtype)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


@torch.library.custom_op("gptfast::add_layer_norm", mutates_args=())
def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    h = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    y, mean, rstd = _launch_forward(x, residual, weight, bias, eps, seed, dropout_p, h)
    return y, h, mean, rstd


@_add_forward.register_fake
def _(x, residual, weight, bias, seed, eps, dropout_p):
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return torch.empty_like(h), h, *_statistics(x)


@torch.library.custom_op("gptfast::add_layer_norm_backward", mutates_args=())
def _add_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, has_bias: bool, x_dtype: torch.dtype, residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of residual, x, weight and bias. That of x is empty where it is the residual's, bit for bit."""
    dresidual = torch.empty(h.shape, dtype=residual_dtype, device=h.device)
    dx = None if _one_gradient(seed, x_dtype, residual_dtype) else torch.empty_like(dresidual, dtype=x_dtype)
    dweight, dbias = _launch_backward(dy, dh, h, weight, mean, rstd, has_bias, seed, dropout_p, dresidual, dx)
    return dresidual, h.new_empty(0) if dx is None else dx, dweight, dbias


@_add_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, seed, dropout_p, has_bias, x_dtype, residual_dtype):
    dresidual = h.new_empty(h.shape, dtype=residual_dtype)
    one = _one_gradient(seed, x_dtype, residual_dtype)
    return dresidual, h.new_empty(0) if one else h.new_empty(h.shape, dtype=x_dtype), *_parameter_gradients(h)


def _one_gradient(seed: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype) -> bool:
    return seed is None and x_dtype == residual_dtype


def _add_save_for_backward(ctx, inputs, output):
    x, residual, weight, bias, seed, _, ctx.dropout_p = inputs
    _, h, mean, rstd = output
    ctx.save_for_backward(h, weight, mean, rstd, seed)
    ctx.dtypes = (x.dtype, residual.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)


def _add_gradients(ctx, dy, dh, _dmean, _drstd):
    h, weight, mean, rstd, seed = ctx.saved_tensors
    if dy is None:  # the normalised rows were not used
        dy = torch.zeros_like(h)
    dresidual, dx, dweight, dbias = _add_backward(
        dy, dh, h, weight, mean, rstd, seed, ctx.dropout_p, ctx.bias_dtype is not None, *ctx.dtypes
    )
    dx = dresidual if _one_gradient(seed, *ctx.dtypes) else dx
    return dx, dresidual, *_in_dtypes(weight, ctx.bias_dtype, dweight, dbias), None, None, None


_add_forward.register_autograd(_add_gradients, setup_context=_add_save_for_backward)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """Normalise each row: (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    One read and one write of x; statistics and parameter gradients in float32; bitwise the same on every run. Where
    Triton cannot run (CPU tensors), this is `kernels.reference.layer_norm`. Under CUDA's `torch.autocast` the result
    is float32, as PyTorch's is.

    Args:
        x: [..., C], float32, float16 or bfloat16, any strides.
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
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
    if x.device.type == "cuda" and runtime.autocast_dtype(x.device) is not None:
        x = x.float()
    y, _, _ = _forward(x, weight, bias, float(eps))
    return y


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a sublayer's output to the residual stream and normalise the sum, in one pass over memory.

    h = residual + dropout(x); y = layer_norm(h). The backward adds the gradient of h's other readers in its own pass.
    Method as `layer_norm`; the dropout's mask is a function of the seed and an element's position (Philox, Salmon et
    al. 2011), so that the backward computes it anew. Where Triton cannot run, this is
    `kernels.reference.add_layer_norm`. Under CUDA's `torch.autocast` both results are float32.

    Args:
        x: [..., C], float32, float16 or bfloat16, any strides.
        residual: [..., C], the shape of x; also in another of these dtypes.
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        eps: added to the (biased) variance, inside the root.
        dropout_p: the share of x set to zero, in [0, 1); the rest grows by 1 / (1 - dropout_p).
        seed: of the dropout, an int or a one-element int64 tensor on the device of x, which CUDA graphs and
            checkpointing replay; None draws one from PyTorch's generator.

    Returns:
        y and h, both [..., C], contiguous, in the wider dtype of x and residual.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed)
    if not tile.launchable(x.device):
        return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed)
    runtime.require_dtype("add_layer_norm", x)
    runtime.require_dtype("add_layer_norm", residual)
    if x.device.type == "cuda" and runtime.autocast_dtype(x.device) is not None:
        residual = residual.float()
    seed = runtime.dropout_seed(dropout_p, seed, x.device)
    y, h, _, _ = _add_forward(x, residual, weight, bias, seed, float(eps), float(dropout_p))
    return y, h
