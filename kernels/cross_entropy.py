"""Cross-entropy of a linear layer's logits, computed in chunks of rows so that the logits never exist at once.

A chunk takes three matmuls and one kernel: cuBLAS computes its logits, the kernel turns them into losses and, in place,
into their gradient, and two more matmuls compute the gradients of x and weight.

Tiles: a program has one row of a chunk's logits [rows, n_columns], and b_z is a tile [LANES, WIDTH] of the row. WIDTH
logits, 16 bytes, belong to one thread. Each lane has a maximum m_i and a sum of exponentials l_i, reduced at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.tuning import Config, Tunable
from kernels.workload import CodegenCase, WarmupCase, Workload

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e38)  # finite: -inf minus itself is NaN


@triton.jit
def _load_logits(p_row, cols, n_classes, n_columns, FULL: tl.constexpr):
    """Logits of a row at `cols` in float32, -inf past n_classes. FULL: all `cols` are classes.

    The mask ends at n_columns, a multiple of 16 bytes: one that ended at n_classes would split the vector loads.
    """
    if FULL:
        b_z = tl.load(p_row + cols).to(tl.float32)
    else:
        b_z = tl.load(p_row + cols, mask=cols < n_columns, other=float("-inf")).to(tl.float32)
        b_z = tl.where(cols < n_classes, b_z, float("-inf"))
    return b_z


@triton.jit
def _online_softmax(
    m_i, l_i, total, p_row, cols, n_classes, n_columns, SMOOTHED: tl.constexpr, FULL: tl.constexpr
):  # fmt: skip
    """Update maximum, sum of exponentials and sum, [LANES] each, by the logits at `cols`."""
    b_z = _load_logits(p_row, cols, n_classes, n_columns, FULL)  # [LANES, WIDTH]
    m_new = tl.maximum(m_i, tl.max(b_z, 1))
    # subtract before the multiplication: the difference is exact where logits are large and close
    l_i *= tl.exp2((m_i - m_new) * _LOG2_E)
    l_i += tl.sum(tl.exp2((b_z - m_new[:, None]) * _LOG2_E), 1)
    if SMOOTHED:
        total += tl.sum(b_z if FULL else tl.where(cols < n_classes, b_z, 0.0), 1)
    return m_new, l_i, total


@triton.jit
def _gradient(b_z, m, factor, smoothing):
    """Gradient of logits other than the target's: exp(z - m) * factor - smoothing."""
    return tl.exp2((b_z - m) * _LOG2_E) * factor - smoothing


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, upstream_ptr,
    n_classes, n_columns, ignore_index, label_smoothing, z_loss,
    SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the loss of a row of `n_classes` logits and, over the logits, its gradient times the row's upstream.

    Columns from n_classes to n_columns, the row stride, are padding and get zeros. A row with `ignore_index` is not
    read and gets zeros. A target out of range makes the loss and the gradient NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + row * n_columns
    target = tl.load(targets_ptr + row)
    WIDTH: tl.constexpr = 128 // logits_ptr.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // WIDTH
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]  # [LANES, WIDTH]

    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros([LANES, WIDTH], dtype=logits_ptr.dtype.element_ty)
            for start in range(0, n_columns, BLOCK):
                tl.store(p_row + start + offsets, zeros, mask=start + offsets < n_columns)
        return

    valid = (target >= 0) & (target < n_classes)
    # read before the row is overwritten: the reductions below are barriers for all threads
    target_logit = tl.load(p_row + target, mask=valid, other=float("nan")).to(tl.float32)

    n_full = n_classes // BLOCK * BLOCK  # blocks up to here need no masks
    m_i = tl.full([LANES], _LOWEST, dtype=tl.float32)
    l_i = tl.zeros([LANES], dtype=tl.float32)
    total = tl.zeros([LANES], dtype=tl.float32)
    for start in range(0, n_full, BLOCK):
        m_i, l_i, total = _online_softmax(
            m_i, l_i, total, p_row, start + offsets, n_classes, n_columns, SMOOTHED, True
        )  # fmt: skip
    for start in range(n_full, n_classes, BLOCK):
        m_i, l_i, total = _online_softmax(
            m_i, l_i, total, p_row, start + offsets, n_classes, n_columns, SMOOTHED, False
        )  # fmt: skip
    m = tl.max(m_i, 0)
    sum_exp = tl.sum(l_i * tl.exp2((m_i - m) * _LOG2_E), 0)
    log_sum_exp = tl.log(sum_exp)
    lse = m + log_sum_exp

    loss = (m - target_logit) + log_sum_exp  # -log softmax(z)[target]
    if SMOOTHED:
        loss += label_smoothing * (target_logit - tl.sum(total, 0) / n_classes)
    loss += z_loss * lse * lse
    tl.store(losses_ptr + row, loss)

    if GRADIENT:
        upstream = 1.0
        if UPSTREAM:
            upstream = tl.load(upstream_ptr + row)
        # d lse^2 / dz = 2 lse softmax(z)
        factor = upstream * (1.0 + 2.0 * z_loss * lse) / sum_exp
        factor = tl.where(valid, factor, float("nan"))
        smoothing = upstream * label_smoothing / n_classes
        on_target = upstream * (1.0 - label_smoothing)  # computed before the loops, which saves registers
        for start in range(0, n_full, BLOCK):
            cols = start + offsets
            b_z = _load_logits(p_row, cols, n_classes, n_columns, True)
            b_dz = _gradient(b_z, m, factor, smoothing)
            tl.store(p_row + cols, b_dz.to(logits_ptr.dtype.element_ty))
        for start in range(n_full, n_columns, BLOCK):
            cols = start + offsets
            b_z = _load_logits(p_row, cols, n_classes, n_columns, False)
            b_dz = tl.where(cols < n_classes, _gradient(b_z, m, factor, smoothing), 0.0)
            tl.store(p_row + cols, b_dz.to(logits_ptr.dtype.element_ty), mask=cols < n_columns)
        # the store below overwrites one of the loop's, perhaps another thread's
        tl.debug_barrier()
        dz_target = _gradient(target_logit, m, factor, smoothing) - on_target
        tl.store(p_row + target, dz_target.to(logits_ptr.dtype.element_ty), mask=valid)


_ROW_MULTIPLE = 64  # logits: rows of 16-byte multiples make matmuls fast and loads wide
_TILE_ROWS = 128  # of a matmul


def _configs(architecture: str, classes: int, dtype: torch.dtype, gradient: bool) -> list[Config]:
    """Eight logits a thread, which is one load of 16 bytes in half precision.

    With wide programs fewer rows are in flight, so that they are still in L2 for the second read.
    """
    blocks = (8192, 2048, 1024) if classes > 4096 else (1024, 2048)
    warp_size = 64 if architecture.startswith("gfx") else 32
    return [{"BLOCK": block, "num_warps": block // 8 // warp_size} for block in blocks]


_CROSS_ENTROPY = Tunable("cross_entropy", _configs)


def chunk_rows(n_rows: int, row_bytes: int, workspace_bytes: int) -> int:
    """Return the rows of a chunk: equal chunks that fit in the workspace, in whole matmul tiles where possible."""
    fitting = max(1, workspace_bytes // row_bytes)
    if fitting >= n_rows:
        return n_rows
    rows = runtime.cdiv(n_rows, runtime.cdiv(n_rows, fitting))
    tiles = runtime.cdiv(rows, _TILE_ROWS) * _TILE_ROWS
    return tiles if tiles <= fitting else rows


def _launch(
    x: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None, ignore_index: int, vocab_size: int,
    label_smoothing: float, z_loss: float, workspace_bytes: int, x_gradient: bool, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute losses [N] in float32, and the gradients of their sum weighted by `upstream` [N], ones if None.

    dx is [N, C] in the dtype of x, dweight [V, C] in float32. A gradient that is not needed is empty.
    """
    x, weight, targets = x.reshape(-1, x.shape[-1]), weight.to(x.dtype), targets.reshape(-1).contiguous()
    upstream = None if upstream is None else upstream.reshape(-1).to(torch.float32).contiguous()
    (n_rows, width), n_columns = x.shape, weight.shape[0]
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    dx = x.new_empty(n_rows if x_gradient else 0, width)
    dweight = torch.empty(n_columns if weight_gradient else 0, width, dtype=torch.float32, device=x.device)
    if n_rows == 0:
        return losses, dx, dweight.zero_()
    stride = runtime.cdiv(n_columns, _ROW_MULTIPLE) * _ROW_MULTIPLE
    rows = chunk_rows(n_rows, stride * x.itemsize, workspace_bytes)
    workspace = x.new_empty(rows, stride)
    for start in range(0, n_rows, rows):
        chunk = slice(start, min(start + rows, n_rows))
        logits = workspace[: chunk.stop - start, :n_columns]  # [rows, V]

        # a measurement calls this several times: the matmul restores the logits that the kernel overwrites
        def run(config: Config, chunk: slice = chunk, logits: Tensor = logits) -> None:
            torch.mm(x[chunk], weight.t(), out=logits)
            with runtime.on_device(x):
                _cross_entropy_kernel[(logits.shape[0],)](
                    logits, targets[chunk], losses[chunk], None if upstream is None else upstream[chunk],
                    vocab_size, stride, ignore_index, label_smoothing, z_loss,
                    SMOOTHED=label_smoothing > 0.0, GRADIENT=x_gradient or weight_gradient,
                    UPSTREAM=upstream is not None, **config,
                )  # fmt: skip

        _CROSS_ENTROPY.launch(run, x.device, vocab_size, x.dtype, x_gradient or weight_gradient)
        if x_gradient:
            torch.mm(logits, weight, out=dx[chunk])
        if weight_gradient:
            _accumulate_matmul(dweight, logits.t(), x[chunk], first=start == 0)
    return losses, dx, dweight


def _accumulate_matmul(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to `total` in float32. The first chunk overwrites `total`."""
    beta = 0.0 if first else 1.0
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)


def _compute(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, vocab_size: int,
    label_smoothing: float, z_loss: float, workspace_bytes: int, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the loss, the gradients of its sum for x and weight where `needed`, and the count of rows in float32.

    The forward computes gradients while it has the logits, and the backward multiplies them by the scalar upstream
    gradient. With reduction "none" each row has an upstream gradient, and the backward computes all of it.
    """
    reduced = reduction != "none"
    losses, dx, dweight = _launch(
        x, weight, targets, None, ignore_index, vocab_size, label_smoothing, z_loss, workspace_bytes,
        reduced and needed[0], reduced and needed[1],
    )  # fmt: skip
    if not reduced:
        return losses.view(targets.shape), dx, dweight, losses.new_empty(0)
    counted = (targets != ignore_index).sum().to(torch.float32)
    total = losses.sum()
    return total / counted if reduction == "mean" else total, dx, dweight, counted


_forward = torch.library.custom_op("gptfast::linear_cross_entropy", _compute, mutates_args=())


@_forward.register_fake
def _(x, weight, targets, ignore_index, reduction, vocab_size, label_smoothing, z_loss, workspace_bytes, needed):
    reduced = reduction != "none"
    n_rows, width = x.numel() // x.shape[-1], x.shape[-1]
    return (
        x.new_empty(() if reduced else targets.shape, dtype=torch.float32),
        x.new_empty(n_rows if reduced and needed[0] else 0, width),
        x.new_empty(weight.shape[0] if reduced and needed[1] else 0, width, dtype=torch.float32),
        x.new_empty(() if reduced else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("gptfast::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, dx: Tensor, dweight: Tensor, counted: Tensor,
    ignore_index: int, reduction: str, vocab_size: int, label_smoothing: float, z_loss: float, workspace_bytes: int,
    needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x and weight where `needed`, else empty tensors."""
    if reduction == "none":
        _, dx, dweight = _launch(
            x, weight, targets, dloss, ignore_index, vocab_size, label_smoothing, z_loss, workspace_bytes, *needed
        )
        return [
            dx.view(x.shape) if needed[0] else x.new_empty(0),
            dweight.to(weight.dtype) if needed[1] else weight.new_empty(0),
        ]
    # clamped, so that the gradient is zero where no row counts, as PyTorch's is
    scale = dloss / counted.clamp(min=1.0) if reduction == "mean" else dloss
    gradients = [
        torch.empty(t.shape if need else (0,), dtype=t.dtype, device=x.device)
        for t, need in zip((x, weight), needed, strict=True)
    ]
    for gradient, unscaled in zip(gradients, (dx, dweight), strict=True):
        torch.mul(unscaled.view(gradient.shape), scale, out=gradient)
    return gradients


@_backward.register_fake
def _(dloss, x, weight, targets, dx, dweight, counted, *options):
    needed = options[-1]
    return [t.new_empty(t.shape if need else (0,)) for t, need in zip((x, weight), needed, strict=True)]


def _save_for_backward(ctx, inputs, output):
    x, weight, targets, *ctx.options = inputs
    _, dx, dweight, counted = output
    ctx.save_for_backward(x, weight, targets, dx, dweight, counted)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dloss, _dx, _dweight, _counted):
    if dloss is None:
        return (None,) * 10
    needed = [bool(need) for need in ctx.needs_input_grad[:2]]
    *options, _ = ctx.options
    gradients = _backward(dloss, *ctx.saved_tensors, *options, needed)
    return (*(g if need else None for g, need in zip(gradients, needed, strict=True)), *(None,) * 8)


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.gptfast.linear_cross_entropy)
def _forward_flops(x_shape, weight_shape, targets_shape, *args, out_shape=None, **kwargs) -> int:
    needed, reduction = args[-1], args[1]
    matmuls = 1 + (sum(needed) if reduction != "none" else 0)
    return 2 * matmuls * x_shape.numel() * weight_shape[0]


@register_flop_formula(torch.ops.gptfast.linear_cross_entropy_backward)
def _backward_flops(dloss_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    needed, reduction = args[-1], args[5]
    return 2 * (1 + sum(needed)) * x_shape.numel() * weight_shape[0] if reduction == "none" else 0


@reference.document_arguments
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean",
    vocab_size: int | None = None, label_smoothing: float = 0.0, z_loss: float = 0.0, workspace_bytes: int = 2**29,
) -> Tensor:  # fmt: skip
    """Compute the cross-entropy of softmax(x @ weight.T) and targets without holding all logits.

    Rows are processed in chunks: cuBLAS computes the logits, one kernel turns them into losses and, in place, into
    their gradient (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867), and two matmuls compute the
    gradients of x and weight, the latter summed in float32. Both gradients are ready after the forward, and the
    backward multiplies them by a scalar. With reduction "none" the backward computes the logits a second time. Without
    gradients nothing is saved. float32 inputs follow `torch.get_float32_matmul_precision()`. A second derivative raises
    RuntimeError.
    """
    arguments = (targets, ignore_index, reduction, vocab_size, label_smoothing, z_loss, workspace_bytes)
    checks.linear_cross_entropy(x, weight, *arguments)
    if not tile.launchable(x.device):
        return reference.linear_cross_entropy(x, weight, *arguments)
    runtime.require_dtype("linear_cross_entropy", x)
    dtype = runtime.autocast_dtype(x.device)
    if dtype is not None:  # the weight is cast later, its gradient keeps the precision of its sum
        x = x.to(dtype)
    needed = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight)]
    forward = _compute if runtime.can_skip_dispatcher(x, weight, targets) else _forward
    classes = weight.shape[0] if vocab_size is None else vocab_size
    return forward(
        x, weight, targets, ignore_index, reduction, classes, float(label_smoothing), float(z_loss), workspace_bytes,
        needed,
    )[0]  # fmt: skip


def codegen_cases(dtype: torch.dtype) -> Iterator[CodegenCase]:
    """An even and an odd number of classes, with label smoothing and without, with gradients and without."""
    for classes in (128, 50_257):
        x, w = torch.empty(64, 64, dtype=dtype), torch.empty(classes, 64, dtype=dtype)
        targets = torch.zeros(64, dtype=torch.int64)
        for smoothing in (0.0, 0.1):
            case = f"linear_cross_entropy V={classes}" + (" smoothed" if smoothing else "")
            arguments = (x, w, targets, -100, "mean", classes, smoothing, 1e-4, 2**29)
            yield case, _compute, (*arguments, [True, True])
            yield f"{case} inference", _compute, (*arguments, [False, False])


def warmup_cases(workload: Workload) -> Iterator[WarmupCase]:
    """The loss of a model."""
    if workload.stage == "decode":
        return
    model, batch, length = workload.model, workload.batch_size, workload.length
    x = workload.tensor(batch, length, model.n_embd, dtype=workload.matmul_dtype)
    weight = workload.tensor(model.padded_vocab_size, model.n_embd)
    targets = torch.zeros(batch, length, dtype=torch.int64, device=workload.device)
    yield partial(linear_cross_entropy, x, weight, targets, -1, vocab_size=model.vocab_size)
