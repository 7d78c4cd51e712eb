"""The kernel of the loss: a row of logits becomes its cross-entropy and, in place, its gradient."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e38)  # finite, so that its difference to itself is a number


@triton.jit
def _logits(p_row, cols, n_classes, n_columns, WHOLE: tl.constexpr):
    """A row's logits at `cols` in float32, -inf where there is no class. WHOLE: there are classes everywhere.

    The mask of the load ends where memory does, at a multiple of 16 bytes, whatever the number of classes: else every
    number would be a load of its own.
    """
    if WHOLE:
        z = tl.load(p_row + cols).to(tl.float32)
    else:
        z = tl.load(p_row + cols, mask=cols < n_columns, other=float("-inf")).to(tl.float32)
        z = tl.where(cols < n_classes, z, float("-inf"))
    return z


@triton.jit
def _joined(
    highest, exponentials, total, p_row, cols, n_classes, n_columns, SMOOTHED: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Maximum, sum of exponentials and sum, [LANES] each, of what they were of and of the logits at `cols` too.

    All in one pass (Milakov and Gimelshein 2018, arXiv:1805.02867).
    """
    z = _logits(p_row, cols, n_classes, n_columns, WHOLE)  # [LANES, WIDTH]
    higher = tl.maximum(highest, tl.max(z, 1))
    # differences first: they are exact where logits are large and close
    exponentials *= tl.exp2((highest - higher) * _LOG2_E)
    exponentials += tl.sum(tl.exp2((z - higher[:, None]) * _LOG2_E), 1)
    if SMOOTHED:
        total += tl.sum(z if WHOLE else tl.where(cols < n_classes, z, 0.0), 1)
    return higher, exponentials, total


@triton.jit
def _gradient(z, highest, share, on_all):
    """The gradient of logits that are not the target's."""
    return tl.exp2((z - highest) * _LOG2_E) * share - on_all


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, upstream_ptr,
    n_classes, n_columns, ignore_index, label_smoothing, z_loss,
    SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of a row of `n_classes` logits, and its gradient, times the row's upstream, where the logits were.

    Columns from n_classes to n_columns, the length of a row in memory, are padding: they take no part and get zeros. So
    does a row that is ignored, which is not read. A target that is no class makes the loss and the gradient NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + row * n_columns
    target = tl.load(targets_ptr + row)
    # WIDTH numbers, 16 bytes, are one thread's: LANES of them have sums of their own, joined once, at the end
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
    # read before the row is overwritten: the reductions below hold all threads until all have it
    target_logit = tl.load(p_row + target, mask=valid, other=float("nan")).to(tl.float32)

    # blocks of classes alone need no masks
    whole = n_classes // BLOCK * BLOCK
    highests = tl.full([LANES], _LOWEST, dtype=tl.float32)
    exponentials = tl.zeros([LANES], dtype=tl.float32)
    total = tl.zeros([LANES], dtype=tl.float32)
    for start in range(0, whole, BLOCK):
        highests, exponentials, total = _joined(
            highests, exponentials, total, p_row, start + offsets, n_classes, n_columns, SMOOTHED, True
        )
    for start in range(whole, n_classes, BLOCK):
        highests, exponentials, total = _joined(
            highests, exponentials, total, p_row, start + offsets, n_classes, n_columns, SMOOTHED, False
        )
    highest = tl.max(highests, 0)
    sum_of_exponentials = tl.sum(exponentials * tl.exp2((highests - highest) * _LOG2_E), 0)
    log_sum = tl.log(sum_of_exponentials)
    lse = highest + log_sum

    loss = (highest - target_logit) + log_sum  # -log softmax(z)[target]
    if SMOOTHED:
        loss += label_smoothing * (target_logit - tl.sum(total, 0) / n_classes)
    loss += z_loss * lse * lse
    tl.store(losses_ptr + row, loss)

    if GRADIENT:
        upstream = 1.0
        if UPSTREAM:
            upstream = tl.load(upstream_ptr + row)
        # d lse^2 / dz = 2 lse softmax(z)
        share = upstream * (1.0 + 2.0 * z_loss * lse) / sum_of_exponentials
        share = tl.where(valid, share, float("nan"))
        on_all = upstream * label_smoothing / n_classes
        on_target = upstream * (1.0 - label_smoothing)
        for start in range(0, whole, BLOCK):
            cols = start + offsets
            z = _logits(p_row, cols, n_classes, n_columns, True)
            gradient = _gradient(z, highest, share, on_all)
            tl.store(p_row + cols, gradient.to(logits_ptr.dtype.element_ty))
        for start in range(whole, n_columns, BLOCK):
            cols = start + offsets
            z = _logits(p_row, cols, n_classes, n_columns, False)
            gradient = tl.where(cols < n_classes, _gradient(z, highest, share, on_all), 0.0)
            tl.store(p_row + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < n_columns)
        # over what the loop wrote there, perhaps from another thread
        tl.debug_barrier()
        gradient = _gradient(target_logit, highest, share, on_all) - on_target
        tl.store(p_row + target, gradient.to(logits_ptr.dtype.element_ty), mask=valid)
