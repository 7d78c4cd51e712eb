"""The GELU feed-forward: activation in the epilogue of the up-projection, its derivative in that of the backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.ffn_launch import launch_down_backward, launch_up
from kernels.workload import CodegenCase, WarmupCase, Workload


def _compute(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, activation: str, save_z: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])  # [M, C]
    if rows.shape[0] == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(0, w_up.shape[0])
    # parameters may be wider than x, as autocast has them: their gradients are then as precise as they are summed
    w_up, w_down = w_up.to(x.dtype), w_down.to(x.dtype)
    b_up, b_down = (None if b is None else b.to(x.dtype).contiguous() for b in (b_up, b_down))
    h, z = launch_up(rows, w_up, b_up, activation, save_z, implementation)
    return torch.nn.functional.linear(h, w_down, b_down).view(x.shape), z


_forward = torch.library.custom_op("gptfast::gelu_ffn", _compute, mutates_args=())


@_forward.register_fake
def _(x, w_up, b_up, w_down, b_down, activation, save_z, implementation):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1] if save_z else 0, w_up.shape[0])


@torch.library.custom_op("gptfast::gelu_ffn_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, z: Tensor, activation: str, needed: list[bool],
    implementation: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, w_up, b_up, w_down and b_down where `needed`, else an empty tensor; of biases in float32."""
    width = x.shape[-1]
    rows, dy_rows = x.reshape(-1, width), dy.reshape(-1, width)  # [M, C]
    if rows.shape[0] == 0:
        return [gradient.zero_() for gradient in _empty_gradients(x, w_up, w_down, needed)]
    up, down = w_up.to(x.dtype), w_down.to(x.dtype)
    dz = h = db_up = rows  # nothing of them is used where only the last bias needs a gradient
    if any(needed[:4]):
        dz, h, db_up = launch_down_backward(dy_rows, down, z, activation, needed[3], needed[2], implementation)
    return [
        (dz @ up).view(x.shape) if needed[0] else x.new_empty(0),
        _weight_gradient(dz, rows, w_up.dtype) if needed[1] else w_up.new_empty(0),
        db_up if needed[2] else x.new_empty(0, dtype=torch.float32),
        _weight_gradient(dy_rows, h, w_down.dtype) if needed[3] else w_down.new_empty(0),
        dy_rows.sum(0, dtype=torch.float32) if needed[4] else x.new_empty(0, dtype=torch.float32),
    ]


def _empty_gradients(x: Tensor, w_up: Tensor, w_down: Tensor, needed: list[bool]) -> list[Tensor]:
    hidden, width = w_up.shape
    shapes = (x.shape, (hidden, width), (hidden,), (width, hidden), (width,))
    dtypes = (x.dtype, w_up.dtype, torch.float32, w_down.dtype, torch.float32)
    return [
        x.new_empty(shape if wanted else (0,), dtype=dtype)
        for shape, dtype, wanted in zip(shapes, dtypes, needed, strict=True)
    ]


@_backward.register_fake
def _(dy, x, w_up, w_down, z, activation, needed, implementation):
    return _empty_gradients(x, w_up, w_down, needed)


def _weight_gradient(dz: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """dz.T @ x, summed over all rows in float32: cuBLAS may add parts of so long a sum in half precision."""
    if dz.device.type != "cuda" or dz.dtype == torch.float32:
        return (dz.T @ x).to(dtype)
    return torch.mm(dz.T, x, out_dtype=torch.float32).to(dtype)


def _save_for_backward(ctx, inputs, output):
    x, w_up, b_up, w_down, b_down, ctx.activation, save_z, ctx.implementation = inputs
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (b_up, b_down)]
    if save_z:
        ctx.save_for_backward(x, w_up, w_down, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _dz):
    if dy is None:
        return (None,) * 8
    needed = [bool(need) for need in ctx.needs_input_grad[:5]]
    gradients = _backward(dy, *ctx.saved_tensors, ctx.activation, needed, ctx.implementation)
    for index, dtype in zip((2, 4), ctx.bias_dtypes, strict=True):
        if needed[index]:
            gradients[index] = gradients[index].to(dtype)
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.gptfast.gelu_ffn)
def _forward_flops(x_shape, w_up_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * x_shape.numel() * w_up_shape[0]


@register_flop_formula(torch.ops.gptfast.gelu_ffn_backward)
def _backward_flops(dy_shape, x_shape, w_up_shape, w_down_shape, z_shape, activation, needed, *args, **kwargs) -> int:
    products = 1 + sum(needed[i] for i in (0, 1, 3))
    return 2 * products * x_shape.numel() * w_up_shape[0]


def gelu_ffn(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str = "gelu_tanh",
    implementation: str = "auto",
) -> Tensor:
    """The feed-forward of a transformer block: activation(x @ w_up.T + b_up) @ w_down.T + b_down.

    Activations as Hendrycks and Gimpel 2016 (arXiv:1606.08415). Only the result of the first product is kept for the
    backward, which computes the activation from it anew. Two implementations: "fused", Triton products with bias and
    activation, or the derivative of the activation, in their epilogues, and "unfused", cuBLAS and one kernel for the
    activation. Fusing saves a pass over the hidden layer and costs some of the product's speed, so it wins where C is
    small. The other products are cuBLAS's. Products accumulate in float32; float32 inputs follow
    `torch.get_float32_matmul_precision()`. Where Triton cannot run (CPU tensors), this is `kernels.reference.gelu_ffn`.

    Args:
        x: [..., C], float32, float16 or bfloat16, any strides.
        w_up: [F, C], as in `nn.Linear(C, F)`.
        b_up: [F] or None.
        w_down: [C, F], as in `nn.Linear(F, C)`.
        b_down: [C] or None.
        activation: `gelu_tanh` (GPT-2's), `gelu` (erf) or `relu`.
        implementation: `fused` or `unfused`, forward and backward; `auto` takes for each what was measured to be
            faster for this dtype, shape and chip, or is estimated to be where nobody has measured.

    Returns:
        [..., C], contiguous, in the dtype of the inputs, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.gelu_ffn(x, w_up, b_up, w_down, b_down, activation, implementation)
    if not tile.launchable(x.device):
        return reference.gelu_ffn(x, w_up, b_up, w_down, b_down, activation, implementation)
    runtime.require_dtype("gelu_ffn", x)
    dtype = runtime.autocast_dtype(x.device)
    if dtype is not None:
        x = x.to(dtype)
    tensors = (x, w_up, b_up, w_down, b_down)
    save_z = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    forward = _compute if runtime.can_skip_dispatcher(*tensors) else _forward
    y, _ = forward(x, w_up, b_up, w_down, b_down, activation, save_z, implementation)
    return y


def codegen_cases(dtype: torch.dtype) -> Iterator[CodegenCase]:
    """GPT-2's shape with each activation."""
    x, z = torch.empty(128, 768, dtype=dtype), torch.empty(128, 3072, dtype=dtype)
    w_up, w_down = torch.empty(3072, 768, dtype=dtype), torch.empty(768, 3072, dtype=dtype)
    b_up = torch.empty(3072, dtype=dtype)
    needed = [False, False, True, True, False]  # the gradients that Triton computes
    for activation in checks.ACTIVATIONS:
        case = f"gelu_ffn {activation}"
        yield case, _forward, (x, w_up, b_up, w_down, None, activation, True, "auto")
        yield case, _backward, (x, x, w_up, w_down, z, activation, needed, "auto")


def warmup_cases(workload: Workload) -> Iterator[WarmupCase]:
    """The MLP of a block."""
    if workload.stage == "decode":  # a prefill of one token
        return
    model = workload.model
    width, hidden = model.n_embd, 4 * model.n_embd
    x = workload.tensor(workload.batch_size, workload.length, width, dtype=workload.matmul_dtype)
    b_up, b_down = (workload.tensor(hidden), workload.tensor(width)) if model.bias else (None, None)
    w_up, w_down = workload.tensor(hidden, width), workload.tensor(width, hidden)
    yield partial(gelu_ffn, x, w_up, b_up, w_down, b_down, activation=model.activation)
