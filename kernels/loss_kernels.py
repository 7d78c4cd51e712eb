"""The kernel of the loss: a row of logits becomes its cross-entropy and, in place, its gradient."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1.0e38)  # finite, so that its difference to itself is a number


@triton.jit
def _logits(p_row, cols, counted, n_classes, n_columns):
    """A row's logits at `cols` in float32, -inf where there is no class. Of a row that does not count none is read.

    The mask of the load ends where memory does, at a multiple of 16 bytes, whatever the number of classes: else every
    number would be a load of its own.
    """
    z = tl.load(p_row + cols, mask=(cols < n_columns) & counted, other=float("-inf"))
    return tl.where(cols < n_classes, z.to(tl.float32), float("-inf"))


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, upstream_ptr,
    n_classes, n_columns, ignore_index, label_smoothing, z_loss,
    SMOOTHED: tl.constexpr, GRADIENT: tl.constexpr, UPSTREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of a row of `n_classes` logits, and its gradient, times the row's upstream, where the logits were.

    Columns from n_classes to n_columns, the length of a row in memory, are padding: they take no part and get zeros. So
    does a row that is ignored. A target that is no class makes the loss and the gradient NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    p_row = logits_ptr + row * n_columns
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    valid = (target >= 0) & (target < n_classes)
    # read before the row is overwritten: the reductions below hold all threads until all have it
    target_logit = tl.load(p_row + target, mask=counted & valid, other=float("nan")).to(tl.float32)

    # the maximum and the sum of exponentials in one pass (Milakov and Gimelshein 2018, arXiv:1805.02867)
    offsets = tl.arange(0, BLOCK)
    highest = _LOWEST
    exponentials = tl.zeros([BLOCK], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n_classes, BLOCK):
        cols = start + offsets
        z = _logits(p_row, cols, counted, n_classes, n_columns)  # [BLOCK]
        higher = tl.maximum(highest, tl.max(z, 0))
        # differences first: they are exact where logits are large and close
        exponentials = exponentials * tl.exp2((highest - higher) * _LOG2_E) + tl.exp2((z - higher) * _LOG2_E)
        highest = higher
        if SMOOTHED:
            total += tl.where(cols < n_classes, z, 0.0)
    sum_of_exponentials = tl.where(counted, tl.sum(exponentials, 0), 1.0)
    highest = tl.where(counted, highest, 0.0)
    log_sum = tl.log(sum_of_exponentials)
    lse = highest + log_sum

    loss = (highest - target_logit) + log_sum  # -log softmax(z)[target]
    if SMOOTHED:
        loss += label_smoothing * (target_logit - tl.sum(total, 0) / n_classes)
    loss += z_loss * lse * lse
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))

    if GRADIENT:
        upstream = 1.0
        if UPSTREAM:
            upstream = tl.load(upstream_ptr + row)
        # d lse^2 / dz = 2 lse softmax(z)
        share = upstream * (1.0 + 2.0 * z_loss * lse) / sum_of_exponentials
        share = tl.where(valid, share, float("nan"))
        on_all = upstream * label_smoothing / n_classes
        on_target = upstream * (1.0 - label_smoothing)
        for start in range(0, n_columns, BLOCK):
            cols = start + offsets
            z = _logits(p_row, cols, counted, n_classes, n_columns)  # [BLOCK]
            gradient = tl.exp2((z - highest) * _LOG2_E) * share - on_all
            gradient = tl.where(cols == target, gradient - on_target, gradient)
            gradient = tl.where(counted & (cols < n_classes), gradient, 0.0)  # [BLOCK]
            tl.store(p_row + cols, gradient.to(logits_ptr.dtype.element_ty), mask=cols < n_columns)
