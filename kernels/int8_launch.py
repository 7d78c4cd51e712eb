"""Launches of the linear layer with int8 weights: which implementation, its configuration, and the grid.

Three implementations. "sums", for one row: multiplications and additions, as many weights on their way at once as
possible. "tiles", up to 64 rows: matrix units on the int8 weights. "matmul", for more: the weights are made floating
numbers once, and the product is PyTorch's. The first two read a byte for each weight; the last moves five, which many
rows hide.

On an H200 4.3 TB/s times a latency of 0.8 us are 3.4 MB to be on their way, 26 KB on each of 132 processors. GPT-2's
matrices of a layer have 0.6 to 2.4 MB: whatever their shape, nearly all of it is to be asked for at once, by every
processor. So the rules below first give each processor a program, and then make tiles large: 8 KB of weights each,
without a loop up to a width of 4096 ("sums"), or the next two tiles asked for in advance ("tiles"). Of the largest
matrix, [50257, 768], a processor runs 7 programs of "sums" at once and has 42 KB on their way, of "tiles" 6 and 96 KB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import runtime
from kernels.int8_kernels import _int8_sums_kernel, _int8_tiles_kernel
from kernels.tuning import Config, Tunable

_PROCESSORS = 132  # of an H200; others have about as many
_WEIGHTS = 8192  # of a tile
_WIDEST = 4096  # row of weights that "sums" asks for at once
_MOST_ROWS = 64  # of "tiles"


def _sums(outputs: int, width: int, weights: int) -> Config:
    """A program holds whole rows where they fit, and as many of them as leave a program for each processor."""
    inner = min(runtime.next_power_of_2(max(width, 16)), _WIDEST)
    columns = max(1, weights // inner)
    while columns > 1 and runtime.cdiv(outputs, columns) < _PROCESSORS:
        columns //= 2
    return {"BN": columns, "BK": inner, "num_warps": 4}


def _tiles(architecture: str, outputs: int, rows: int, dtype: torch.dtype, widest: int) -> Config:
    """As many outputs as leave a program for each processor: the wider, the less often x is read."""
    columns = widest
    while columns > 16 and runtime.cdiv(outputs, columns) < _PROCESSORS:
        columns //= 2
    inner = _WEIGHTS // max(columns, rows)
    if dtype == torch.float32:  # three parts of each number of x are in registers
        inner = 32 if rows == columns == 64 else max(64, min(2048 // rows, 4096 // columns))
    return {
        "BM": rows, "BN": columns, "BK": inner, "num_warps": 2 if columns == 16 else 4,
        "num_stages": 2 if architecture.startswith("gfx") else 4,
    }  # fmt: skip


def _row_choices(architecture: str, outputs: int, width: int, dtype: torch.dtype) -> list[Config]:
    """Of one row: sums, or tiles of which it fills a sixteenth, which cost less arithmetic for each weight."""
    sums = [_sums(outputs, width, weights) for weights in (_WEIGHTS, 2 * _WEIGHTS)]
    return [*sums, _tiles(architecture, outputs, 16, dtype, 64)]


_ROW = Tunable("int8_row", _row_choices)
_ROWS = Tunable(
    "int8_rows",
    lambda architecture, outputs, rows, dtype: [
        _tiles(architecture, outputs, rows, dtype, widest) for widest in (64, 16)
    ],
)


def launch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x @ weight.T * scale + bias, [M, N], for x [M, K] with M >= 1 and contiguous weight [N, K]."""
    (n_rows, width), outputs = x.shape, weight.shape[0]
    if n_rows > _MOST_ROWS:
        return _matmul(x, weight, scale, bias)
    x = x.contiguous()
    y = x.new_empty(n_rows, outputs)

    def run(options: Config) -> None:
        tiles = "BM" in options
        kernel = _int8_tiles_kernel if tiles else _int8_sums_kernel
        sizes = (n_rows, outputs, width) if tiles else (outputs, width)
        with runtime.on_device(x):
            kernel[(runtime.cdiv(outputs, options["BN"]),)](
                x, weight, scale, bias, y, *sizes, HAS_BIAS=bias is not None, **options
            )

    if n_rows == 1:
        _ROW.launch(run, x.device, outputs, width, x.dtype)
    else:  # numbers of rows that one tile holds share a choice
        _ROWS.launch(run, x.device, outputs, max(16, runtime.next_power_of_2(n_rows)), x.dtype)
    return y


def _matmul(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    dequantised = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    torch.mul(weight, scale[:, None], out=dequantised)  # multiplied in float32, rounded once
    return torch.nn.functional.linear(x, dequantised, None if bias is None else bias.to(x.dtype))
