"""The loss in chunks of rows: a product, the kernel that turns logits into their gradient, and two products more."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import runtime
from kernels.loss_kernels import _cross_entropy_kernel
from kernels.tuning import Config, Tunable

_ALIGNED = 64  # rows of logits begin at multiples of this: fast products and wide loads need 16 bytes
_TILE = 128  # rows of the tiles of a matrix product


def _choices(architecture: str, classes: int, dtype: torch.dtype, gradient: bool) -> list[Config]:
    """Eight numbers to a thread, which is one load of 16 bytes in half precision.

    Wide programs are fewer at once, so that their rows are still in L2 when they are read a second time.
    """
    blocks = (8192, 2048, 1024) if classes > 4096 else (1024, 2048)
    threads = 64 if architecture.startswith("gfx") else 32  # of a warp
    return [{"BLOCK": block, "num_warps": block // 8 // threads} for block in blocks]


_CROSS_ENTROPY = Tunable("cross_entropy", _choices)


def chunk_rows(n_rows: int, row_bytes: int, workspace_bytes: int) -> int:
    """How many rows a chunk has: chunks of one size that fit the workspace, of whole tiles where possible."""
    fitting = max(1, workspace_bytes // row_bytes)
    if fitting >= n_rows:
        return n_rows
    rows = runtime.cdiv(n_rows, runtime.cdiv(n_rows, fitting))
    tiles = runtime.cdiv(rows, _TILE) * _TILE
    return tiles if tiles <= fitting else rows


def launch(
    x: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor | None, ignore_index: int, vocab_size: int,
    label_smoothing: float, z_loss: float, workspace_bytes: int, x_gradient: bool, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The losses of the rows and, where wanted, the gradients of their sum weighted by `upstream` [N], ones if None.

    Arguments as those of `linear_cross_entropy`, N rows in all; `upstream` is shaped as the targets.

    Returns:
        Losses [N] in float32, dx [N, C] in the dtype of x, dweight [V, C] in float32; a gradient that is not wanted
        has no rows.
    """
    x, weight, targets = x.reshape(-1, x.shape[-1]), weight.to(x.dtype), targets.reshape(-1).contiguous()
    upstream = None if upstream is None else upstream.reshape(-1).to(torch.float32).contiguous()
    (n_rows, width), n_columns = x.shape, weight.shape[0]
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    dx = x.new_empty(n_rows if x_gradient else 0, width)
    dweight = torch.empty(n_columns if weight_gradient else 0, width, dtype=torch.float32, device=x.device)
    if n_rows == 0:
        return losses, dx, dweight.zero_()
    stride = runtime.cdiv(n_columns, _ALIGNED) * _ALIGNED
    rows = chunk_rows(n_rows, stride * x.itemsize, workspace_bytes)
    workspace = x.new_empty(rows, stride)
    for start in range(0, n_rows, rows):
        chunk = slice(start, min(start + rows, n_rows))
        logits = workspace[: chunk.stop - start, :n_columns]  # [rows, V]

        # measuring calls this more than once: the product makes anew the logits that the kernel overwrites
        def run(options: Config, chunk: slice = chunk, logits: Tensor = logits) -> None:
            torch.mm(x[chunk], weight.t(), out=logits)
            with runtime.on_device(x):
                _cross_entropy_kernel[(logits.shape[0],)](
                    logits, targets[chunk], losses[chunk], None if upstream is None else upstream[chunk],
                    vocab_size, stride, ignore_index, label_smoothing, z_loss,
                    SMOOTHED=label_smoothing > 0.0, GRADIENT=x_gradient or weight_gradient,
                    UPSTREAM=upstream is not None, **options,
                )  # fmt: skip

        _CROSS_ENTROPY.launch(run, x.device, vocab_size, x.dtype, x_gradient or weight_gradient)
        if x_gradient:
            torch.mm(logits, weight, out=dx[chunk])
        if weight_gradient:
            _add_product(dweight, logits.t(), x[chunk], first=start == 0)
    return losses, dx, dweight


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Write a @ b to `total`, in float32, or add it to what is there."""
    beta = 0.0 if first else 1.0
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)
