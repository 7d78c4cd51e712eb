"""The GELU feed-forward: activation in the epilogue of the up-projection, its derivative in that of the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.tuning import Options, Tunable

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """The activation of z in float32, and its derivative."""
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0), tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * _SQRT_HALF))
        return z * cdf, cdf + z * _INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    else:
        # 0.5 * (1 + tanh(u)) is sigmoid(2u), and the interpreter has no tanh
        u = _SQRT_2_OVER_PI * z * (1.0 + _CUBIC * z * z)
        gate = tl.sigmoid(2.0 * u)
        du = _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * z * z)
        return z * gate, gate + 2.0 * z * gate * (1.0 - gate) * du


@triton.jit
def _ffn_up_kernel(
    x_ptr, w_ptr, b_ptr, h_ptr, z_ptr, n_rows, n_hidden, width,
    stride_x_row, stride_x_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write z = x @ w.T + b [n_rows, n_hidden] and h = activation(z)."""
    rows, cols = tile.grouped_tile(n_rows, n_hidden, BM, BN, GROUP)
    z = tile.matmul(
        x_ptr, w_ptr, rows, cols, n_rows, n_hidden, width,
        stride_x_row, stride_x_col, stride_w_col, stride_w_row, BM, BN, BK, PRECISION,
    )  # [BM, BN]  # fmt: skip
    if HAS_BIAS:
        z += tl.load(b_ptr + cols, mask=cols < n_hidden, other=0.0).to(tl.float32)[None, :]
    h, _ = _activate(z, ACTIVATION)
    mask = (rows < n_rows)[:, None] & (cols < n_hidden)[None, :]
    offsets = rows[:, None] * n_hidden + cols[None, :]
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
    if SAVE_Z:
        tl.store(z_ptr + offsets, z.to(z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _ffn_down_backward_kernel(
    dy_ptr, w_ptr, z_ptr, dz_ptr, h_ptr, n_rows, n_hidden, width,
    stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write dz = (dy @ w) * activation'(z) [n_rows, n_hidden], and h = activation(z) for the gradient of w."""
    rows, cols = tile.grouped_tile(n_rows, n_hidden, BM, BN, GROUP)
    dh = tile.matmul(
        dy_ptr, w_ptr, rows, cols, n_rows, n_hidden, width,
        stride_dy_row, stride_dy_col, stride_w_row, stride_w_col, BM, BN, BK, PRECISION,
    )  # [BM, BN]  # fmt: skip
    mask = (rows < n_rows)[:, None] & (cols < n_hidden)[None, :]
    offsets = rows[:, None] * n_hidden + cols[None, :]
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    h, slope = _activate(z, ACTIVATION)
    tl.store(h_ptr + offsets, h.to(h_ptr.dtype.element_ty), mask=mask)
    tl.store(dz_ptr + offsets, (dh * slope).to(dz_ptr.dtype.element_ty), mask=mask)


def _blocks_rule(architecture: str, dtype: torch.dtype) -> Options:
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    return {"BM": 128, "BN": 64, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


_UP = Tunable("ffn_up", _blocks_rule)
_DOWN_BACKWARD = Tunable("ffn_down_backward", _blocks_rule)


def _grid(n_rows: int, n_hidden: int, options: Options) -> tuple[int]:
    return (runtime.cdiv(n_rows, options["BM"]) * runtime.cdiv(n_hidden, options["BN"]),)


@torch.library.custom_op("gptfast::gelu_ffn", mutates_args=())
def _forward(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, activation: str, save_z: bool
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows = x.reshape(-1, width)  # [M, C]
    n_rows, n_hidden = rows.shape[0], w_up.shape[0]
    h = torch.empty(n_rows, n_hidden, dtype=x.dtype, device=x.device)
    z = torch.empty(n_rows if save_z else 0, n_hidden, dtype=x.dtype, device=x.device)
    b_up = None if b_up is None else b_up.contiguous()

    def launch(options: Options) -> None:
        with runtime.on_device(x):
            _ffn_up_kernel[_grid(n_rows, n_hidden, options)](
                rows, w_up, b_up, h, z, n_rows, n_hidden, width, *rows.stride(), *w_up.stride(),
                ACTIVATION=activation, HAS_BIAS=b_up is not None, SAVE_Z=save_z,
                PRECISION=runtime.dot_precision(x.dtype), **options,
            )  # fmt: skip

    if n_rows > 0:
        _UP.launch(launch, x.device, x.dtype)
    return torch.nn.functional.linear(h, w_down, b_down).view(x.shape), z


@_forward.register_fake
def _(x, w_up, b_up, w_down, b_down, activation, save_z):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1] if save_z else 0, w_up.shape[0])


@torch.library.custom_op("gptfast::gelu_ffn_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, z: Tensor, activation: str, needed: list[bool]
) -> list[Tensor]:
    """The gradients of x, w_up, b_up, w_down and b_down where `needed`, else an empty tensor."""
    width = x.shape[-1]
    rows, dy_rows = x.reshape(-1, width), dy.reshape(-1, width)  # [M, C]
    n_rows, n_hidden = z.shape
    dz, h = torch.empty_like(z), torch.empty_like(z)

    def launch(options: Options) -> None:
        with runtime.on_device(x):
            _ffn_down_backward_kernel[_grid(n_rows, n_hidden, options)](
                dy_rows, w_down, z, dz, h, n_rows, n_hidden, width, *dy_rows.stride(), *w_down.stride(),
                ACTIVATION=activation, PRECISION=runtime.dot_precision(x.dtype), **options,
            )  # fmt: skip

    if n_rows > 0:
        _DOWN_BACKWARD.launch(launch, x.device, x.dtype)
    return [
        (dz @ w_up).view(x.shape) if needed[0] else x.new_empty(0),
        dz.T @ rows if needed[1] else x.new_empty(0),
        dz.sum(0) if needed[2] else x.new_empty(0),
        dy_rows.T @ h if needed[3] else x.new_empty(0),
        dy_rows.sum(0) if needed[4] else x.new_empty(0),
    ]


@_backward.register_fake
def _(dy, x, w_up, w_down, z, activation, needed):
    hidden, width = w_up.shape
    shapes = (x.shape, (hidden, width), (hidden,), (width, hidden), (width,))
    return [x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, needed, strict=True)]


def _save_for_backward(ctx, inputs, output):
    x, w_up, _, w_down, _, ctx.activation, save_z = inputs
    if save_z:
        ctx.save_for_backward(x, w_up, w_down, output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, _dz):
    if dy is None:
        return (None,) * 7
    needed = [bool(need) for need in ctx.needs_input_grad[:5]]
    gradients = _backward(dy, *ctx.saved_tensors, ctx.activation, needed)
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.gptfast.gelu_ffn)
def _forward_flops(x_shape, w_up_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * x_shape.numel() * w_up_shape[0]


@register_flop_formula(torch.ops.gptfast.gelu_ffn_backward)
def _backward_flops(dy_shape, x_shape, w_up_shape, w_down_shape, z_shape, activation, needed, **kwargs) -> int:
    products = 1 + sum(needed[i] for i in (0, 1, 3))
    return 2 * products * x_shape.numel() * w_up_shape[0]


def gelu_ffn(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    activation: str = "gelu_tanh",
) -> Tensor:
    """The feed-forward of a transformer block: activation(x @ w_up.T + b_up) @ w_down.T + b_down.

    Bias and activation (Hendrycks and Gimpel 2016, arXiv:1606.08415) run in the epilogue of the first product. Only
    its result before the activation is kept for the backward, whose first product recomputes the activation and
    multiplies by its derivative in its own epilogue. The other products are PyTorch's. Products accumulate in float32;
    float32 inputs follow `torch.get_float32_matmul_precision()`. Where Triton cannot run (CPU tensors), this is
    `kernels.reference.gelu_ffn`.

    Args:
        x: [..., C], float32, float16 or bfloat16, any strides.
        w_up: [F, C], as in `nn.Linear(C, F)`.
        b_up: [F] or None.
        w_down: [C, F], as in `nn.Linear(F, C)`.
        b_down: [C] or None.
        activation: `gelu_tanh` (GPT-2's), `gelu` (erf) or `relu`.

    Returns:
        [..., C], contiguous, in the dtype of the inputs, or autocast's.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype or device does not fit, named with what is accepted.
        RuntimeError: a second derivative.
    """
    checks.gelu_ffn(x, w_up, b_up, w_down, b_down, activation)
    if not tile.launchable(x.device):
        return reference.gelu_ffn(x, w_up, b_up, w_down, b_down, activation)
    runtime.require_dtype("gelu_ffn", x)
    tensors = [x, w_up, b_up, w_down, b_down]
    dtype = runtime.autocast_dtype(x.device)
    if dtype is not None:
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
    save_z = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    y, _ = _forward(*tensors, activation, save_z)
    return y
