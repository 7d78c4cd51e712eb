"""Layer norm, alone and with the residual addition before it: one read and one write of each row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from kernels import checks, reference, runtime, tile
from kernels.norm_launch import launch_backward, launch_forward
from kernels.workload import CodegenCase, WarmupCase, Workload


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _parameter_gradients(x: Tensor, *wanted: bool) -> Tensor:
    return x.new_empty(sum(wanted), x.shape[-1], dtype=torch.float32)


def _compute(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_forward(x, None, weight, bias, eps, None, 0.0, None, dtype)


_forward = torch.library.custom_op("gptfast::layer_norm", _compute, mutates_args=())


@_forward.register_fake
def _(x, weight, bias, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), *_statistics(x)


@torch.library.custom_op("gptfast::layer_norm_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, weight_gradient: bool, bias_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those wanted of weight and bias as rows [0 to 2, C] in float32."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, launch_backward(
        dy, None, x, weight, mean, rstd, weight_gradient, bias_gradient, None, 0.0, dx, None
    )  # fmt: skip


@_backward.register_fake
def _(dy, x, weight, mean, rstd, weight_gradient, bias_gradient):
    return x.new_empty(x.shape), _parameter_gradients(x, weight_gradient, bias_gradient)


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
    wanted = ctx.needs_input_grad[1:3]
    dx, dparameters = _backward(dy, x, weight, mean, rstd, *wanted)
    return dx, *_split(dparameters, ctx.parameter_dtypes, wanted), None, None


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)


def _split(
    dparameters: Tensor, dtypes: tuple[torch.dtype | None, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of weight and bias in the dtypes of these, None for what is not wanted."""
    rows = iter(dparameters)
    return tuple(next(rows).to(dtype) if want else None for dtype, want in zip(dtypes, wanted, strict=True))


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _add_compute(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, eps: float,
    dropout_p: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    h = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    y, mean, rstd = launch_forward(x, residual, weight, bias, eps, seed, dropout_p, h, dtype)
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
    """Gradients of residual and x, and those wanted of weight and bias as rows [0 to 2, C] in float32.

    That of x is empty where it is the residual's, bit for bit.
    """
    dresidual = torch.empty(h.shape, dtype=residual_dtype, device=h.device)
    dx = None if _one_gradient(seed, x_dtype, residual_dtype) else torch.empty_like(dresidual, dtype=x_dtype)
    dparameters = launch_backward(
        dy, dh, h, weight, mean, rstd, weight_gradient, bias_gradient, seed, dropout_p, dresidual, dx
    )
    return dresidual, h.new_empty(0) if dx is None else dx, dparameters


@_add_backward.register_fake
def _(dy, dh, h, weight, mean, rstd, seed, dropout_p, x_dtype, residual_dtype, weight_gradient, bias_gradient):
    dresidual = h.new_empty(h.shape, dtype=residual_dtype)
    one = _one_gradient(seed, x_dtype, residual_dtype)
    dx = h.new_empty(0) if one else h.new_empty(h.shape, dtype=x_dtype)
    return dresidual, dx, _parameter_gradients(h, weight_gradient, bias_gradient)


def _one_gradient(seed: Tensor | None, x_dtype: torch.dtype, residual_dtype: torch.dtype) -> bool:
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
    if dy is None:  # the normalised rows were not used
        dy = torch.zeros_like(h)
    wanted = ctx.needs_input_grad[2:4]
    dresidual, dx, dparameters = _add_backward(dy, dh, h, weight, mean, rstd, seed, ctx.dropout_p, *ctx.dtypes, *wanted)
    dx = dresidual if _one_gradient(seed, *ctx.dtypes) else dx
    return dx, dresidual, *_split(dparameters, ctx.parameter_dtypes, wanted), *(None,) * 4


_add_forward.register_autograd(_add_gradients, setup_context=_add_save_for_backward)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> Tensor:
    """Normalise each row: (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450).

    One read and one write of x; statistics and parameter gradients in float32; bitwise the same on every run. Where
    Triton cannot run (CPU tensors), this is `kernels.reference.layer_norm`.

    Args:
        x: [..., C], float32, float16 or bfloat16, any strides.
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        eps: added to the (biased) variance, inside the root.
        dtype: of the result; None for that of x, or, as PyTorch's, for float32 under CUDA's `torch.autocast`. Where a
            matrix product comes next, its dtype saves a pass that casts.

    Returns:
        [..., C], contiguous, in `dtype`.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.layer_norm(x, weight, bias, eps, dtype)
    if not tile.launchable(x.device):
        return reference.layer_norm(x, weight, bias, eps, dtype)
    runtime.require_dtype("layer_norm", x)
    if dtype is None and _widened(x):
        dtype = torch.float32
    forward = _compute if runtime.can_skip_dispatcher(x, weight, bias) else _forward
    y, _, _ = forward(x, weight, bias, float(eps), dtype or x.dtype)
    return y


def _widened(x: Tensor) -> bool:
    return x.device.type == "cuda" and runtime.autocast_dtype(x.device) is not None


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a sublayer's output to the residual stream and normalise the sum, in one pass over memory.

    h = residual + dropout(x); y = layer_norm(h). The backward adds the gradient of h's other readers in its own pass.
    Method as `layer_norm`; the dropout's mask is a function of the seed and an element's position (Philox, Salmon et
    al. 2011), so that the backward computes it anew. Where Triton cannot run, this is
    `kernels.reference.add_layer_norm`.

    Args:
        x: [..., C], float32, float16 or bfloat16, any strides.
        residual: [..., C], the shape of x; also in another of these dtypes.
        weight: [C], or None for ones.
        bias: [C], or None for zeros.
        eps: added to the (biased) variance, inside the root.
        dropout_p: the share of x set to zero, in [0, 1); the rest grows by 1 / (1 - dropout_p).
        seed: of the dropout, an int or a one-element int64 tensor on the device of x, which CUDA graphs and
            checkpointing replay; None draws one from PyTorch's generator.
        dtype: of y; None for that of h, and then both are float32 under CUDA's `torch.autocast`.

    Returns:
        y and h, both [..., C], contiguous; y in `dtype`, h in the wider dtype of x and residual.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)
    if not tile.launchable(x.device):
        return reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, dtype)
    runtime.require_dtype("add_layer_norm", x)
    runtime.require_dtype("add_layer_norm", residual)
    if dtype is None and _widened(x):
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
