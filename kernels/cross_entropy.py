"""Cross-entropy of a linear layer's logits, which are never all in memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.loss_launch import launch
from kernels.workload import CodegenCase, WarmupCase, Workload


def _compute(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, vocab_size: int,
    label_smoothing: float, z_loss: float, workspace_bytes: int, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss; gradients of x and weight where `needed`, of the sum over rows; how many rows count, in float32.

    Gradients are computed here if the upstream gradient will be one number, by which they can be multiplied later: the
    logits exist now. With reduction "none" they are not, each row then has an upstream gradient of its own.
    """
    alone = reduction != "none"
    losses, dx, dweight = launch(
        x, weight, targets, None, ignore_index, vocab_size, label_smoothing, z_loss, workspace_bytes,
        alone and needed[0], alone and needed[1],
    )  # fmt: skip
    if reduction == "none":
        return losses.view(targets.shape), dx, dweight, losses.new_empty(0)
    counted = (targets != ignore_index).sum().to(torch.float32)
    total = losses.sum()
    return total / counted if reduction == "mean" else total, dx, dweight, counted


_forward = torch.library.custom_op("gptfast::linear_cross_entropy", _compute, mutates_args=())


@_forward.register_fake
def _(x, weight, targets, ignore_index, reduction, vocab_size, label_smoothing, z_loss, workspace_bytes, needed):
    alone = reduction != "none"
    n_rows, width = x.numel() // x.shape[-1], x.shape[-1]
    return (
        x.new_empty(() if alone else targets.shape, dtype=torch.float32),
        x.new_empty(n_rows if alone and needed[0] else 0, width),
        x.new_empty(weight.shape[0] if alone and needed[1] else 0, width, dtype=torch.float32),
        x.new_empty(() if alone else (0,), dtype=torch.float32),
    )


@torch.library.custom_op("gptfast::linear_cross_entropy_backward", mutates_args=())
def _backward(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, dx: Tensor, dweight: Tensor, counted: Tensor,
    ignore_index: int, reduction: str, vocab_size: int, label_smoothing: float, z_loss: float, workspace_bytes: int,
    needed: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of x and weight where `needed`, else an empty tensor."""
    if reduction == "none":
        _, dx, dweight = launch(
            x, weight, targets, dloss, ignore_index, vocab_size, label_smoothing, z_loss, workspace_bytes, *needed
        )
        return [
            dx.view(x.shape) if needed[0] else x.new_empty(0),
            dweight.to(weight.dtype) if needed[1] else weight.new_empty(0),
        ]
    # rows that do not count have no gradient, so that where none counts it is zero, as PyTorch's
    scale = dloss / counted.clamp(min=1.0) if reduction == "mean" else dloss
    return [
        torch.mul(dx.view(x.shape), scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
        if needed[0]
        else x.new_empty(0),
        torch.mul(dweight, scale, out=torch.empty(weight.shape, dtype=weight.dtype, device=x.device))
        if needed[1]
        else weight.new_empty(0),
    ]


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
    products = 1 + (sum(needed) if reduction != "none" else 0)
    return 2 * products * x_shape.numel() * weight_shape[0]


@register_flop_formula(torch.ops.gptfast.linear_cross_entropy_backward)
def _backward_flops(dloss_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    needed, reduction = args[-1], args[5]
    return 2 * (1 + sum(needed)) * x_shape.numel() * weight_shape[0] if reduction == "none" else 0


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    workspace_bytes: int = 2**29,
) -> Tensor:
    """Cross-entropy of softmax(x @ weight.T) and targets, without ever holding all logits.

    Rows go through in chunks: cuBLAS computes their logits, one kernel turns these into losses and, in place, into
    their own gradient (the log-sum-exp online, Milakov and Gimelshein 2018, arXiv:1805.02867), and two more products
    take that to the gradients of x and weight, the latter summed in float32. So both gradients are ready after the
    forward, and the backward multiplies them by one number. With reduction "none" the backward computes the logits a
    second time; without gradients nothing is kept. float32 inputs follow `torch.get_float32_matmul_precision()`.
    Where Triton cannot run (CPU tensors), this is `kernels.reference.linear_cross_entropy`, which holds all logits.

    Args:
        x: [..., C], float32, float16 or bfloat16.
        weight: [V, C], as in `nn.Linear(C, V)`.
        targets: [...] int64 classes, in [0, vocab_size) or `ignore_index`. On a GPU nobody waits to check them: one
            that is out of range makes the loss and the gradients NaN.
        ignore_index: the target of rows that do not count.
        reduction: `mean` over the rows that count (NaN where none does), `sum`, or `none`.
        vocab_size: the number of classes; rows of weight beyond it are padding and take no part. V if None.
        label_smoothing: the share of the target spread evenly over all classes (Szegedy et al. 2015,
            arXiv:1512.00567), in [0, 1].
        z_loss: the weight of log(Z)^2, which keeps the softmax's normaliser near 1 (Chowdhery et al. 2022,
            arXiv:2204.02311, section 5).
        workspace_bytes: how large a chunk's logits may be. A row is the least; products want about 2,000 rows.

    Returns:
        The loss in float32, a scalar, or [...] with reduction "none", where ignored rows have 0.

    Raises:
        ValueError, TypeError: an argument whose shape, dtype, device or value does not fit, named with what is
            accepted.
        RuntimeError: a second derivative.
    """
    arguments = (targets, ignore_index, reduction, vocab_size, label_smoothing, z_loss, workspace_bytes)
    checks.linear_cross_entropy(x, weight, *arguments)
    if not tile.launchable(x.device):
        return reference.linear_cross_entropy(x, weight, *arguments)
    runtime.require_dtype("linear_cross_entropy", x)
    dtype = runtime.autocast_dtype(x.device)
    if dtype is not None:  # the weight is cast below: its gradient stays as precise as it is summed
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
