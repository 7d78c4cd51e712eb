"""Launches of the norms' kernels: the configurations to choose from, allocation, and the grid."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import philox, runtime
from kernels.norm_kernels import (
    _layer_norm_backward_chunked_kernel,
    _layer_norm_backward_kernel,
    _layer_norm_forward_chunked_kernel,
    _layer_norm_forward_kernel,
    _layer_norm_parameters_kernel,
)
from kernels.tuning import Config, Tunable

# widest row that the registers of a program hold; longer ones are read in chunks. The backward of dropout draws its
# numbers anew, beside all else that it holds.
_WIDEST, _WIDEST_DROPOUT_BACKWARD = 8192, 4096


def _threads(architecture: str) -> int:
    """Of a warp."""
    return 64 if architecture.startswith("gfx") else 32


def _blocks(architecture: str, width: int, elements: int, per_thread: int = 16, fewest: int = 4) -> dict[str, int]:
    """Block shape and warps, `fewest` at least, of a program that holds about `elements` numbers per tensor.

    Whole rows always.
    """
    columns = runtime.next_power_of_2(width)
    rows = max(1, min(32, elements // columns))
    warps = rows * columns // (per_thread * _threads(architecture))
    return {"BM": rows, "BN": columns, "num_warps": min(16, max(fewest, warps))}


def _chunks_below(architecture: str, width: int) -> list[Config]:
    """Block shapes and warps of a program that reads a row in several chunks."""
    return [
        {"BM": 1, "BN": columns, "num_warps": columns // (8 * _threads(architecture))}
        for columns in (4096, 2048, 8192)
        if columns < width
    ]


def _forward_choices(architecture: str, width: int, dtype: torch.dtype, add: bool, dropout: bool) -> list[Config]:
    if width > _WIDEST:
        return _chunks_below(architecture, width)
    # A row of 768 takes 165 cycles of an H200's processor to read and write: with 16 numbers to a thread it takes 204
    # to issue what is done to it, with 32 it takes 132.
    return [
        _blocks(architecture, width, 2048, per_thread=32, fewest=1),
        _blocks(architecture, width, 1024, per_thread=32, fewest=1),
        _blocks(architecture, width, 2048),
        _blocks(architecture, width, 4096),
    ]


def _backward_choices(architecture: str, width: int, dtype: torch.dtype, add: bool, dropout: bool) -> list[Config]:
    if width > (_WIDEST_DROPOUT_BACKWARD if dropout else _WIDEST):
        return _chunks_below(architecture, width)
    # as many programs as run at once: of a width of 768 they are 5, and 7 of half the elements
    return [
        {**_blocks(architecture, width, 2048), "per_processor": 4},
        {**_blocks(architecture, width, 2048), "per_processor": 5},
        {**_blocks(architecture, width, 1024), "per_processor": 7},
    ]


_FORWARD = Tunable("layer_norm_forward", _forward_choices)
# whole rows where BN holds them; else in chunks, the sums for weight and bias by a kernel of their own
_BACKWARD = Tunable("layer_norm_backward", _backward_choices)
# `sums` rows of partial sums; the columns make for enough programs
_PARAMETERS = Tunable(
    "layer_norm_parameters",
    lambda architecture, width, dtype: [
        {"BM": 32, "BN": 128, "num_warps": 4, "sums": 32},
        {"BM": 16, "BN": 256, "num_warps": 4, "sums": 64},
    ],
)


def _rows(x: Tensor) -> Tensor:
    """[..., C] as [M, C] with contiguous rows; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
    seed: Tensor | None, dropout_p: float, h: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normalise each row of x, or of residual + dropout(x), written to h: y in `dtype`, mean and 1 / deviation."""
    rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    weight, bias = runtime.contiguous(weight), runtime.contiguous(bias)
    n_rows, width = rows.shape
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)

    def launch(options: Config) -> None:
        whole = options["BN"] >= width
        kernel = _layer_norm_forward_kernel if whole else _layer_norm_forward_chunked_kernel
        with runtime.on_device(x):
            kernel[(runtime.cdiv(n_rows, options["BM"]),)](
                rows, residual_rows, weight, bias, seed, y, h, mean, rstd,
                n_rows, width, rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0),
                eps, *philox.dropout_constants(dropout_p),
                ADD=residual is not None, DROPOUT=seed is not None, HAS_WEIGHT=weight is not None,
                HAS_BIAS=bias is not None, **options,
            )  # fmt: skip

    if n_rows > 0:
        _FORWARD.launch(launch, x.device, width, x.dtype, residual is not None, seed is not None)
    return y, mean, rstd


def launch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor,
    weight_gradient: bool, bias_gradient: bool, seed: Tensor | None, dropout_p: float,
    dresidual: Tensor, dx: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write the gradients of the rows; return those wanted of weight and bias, in this order: [0 to 2, C], float32."""
    dy, dh, h, weight = _rows(dy), None if dh is None else _rows(dh), _rows(h), runtime.contiguous(weight)
    n_rows, width = h.shape
    wanted = {"WEIGHT_GRADIENT": weight_gradient, "BIAS_GRADIENT": bias_gradient}
    if n_rows == 0:
        return torch.zeros(sum(wanted.values()), width, dtype=torch.float32, device=h.device)

    def launch(options: Config) -> Tensor:
        blocks = {name: options[name] for name in ("BM", "BN", "num_warps")}
        whole = blocks["BN"] >= width
        programs = runtime.cdiv(n_rows, blocks["BM"])
        if whole:
            programs = min(programs, runtime.program_count(h.device, options["per_processor"]))
        # partial sums, a row for each program, added below in a fixed order: the same bits on every run
        sums = h.new_empty(sum(wanted.values()), programs if whole else 0, width, dtype=torch.float32)
        kernel = _layer_norm_backward_kernel if whole else _layer_norm_backward_chunked_kernel
        with runtime.on_device(h):
            kernel[(programs,)](
                dy, dh, h, weight, mean, rstd, seed, dresidual, dx, sums,
                n_rows, width, dy.stride(0), 0 if dh is None else dh.stride(0), h.stride(0),
                *philox.dropout_constants(dropout_p),
                HAS_DH=dh is not None, DROPOUT=seed is not None, STORE_DX=dx is not None,
                HAS_WEIGHT=weight is not None, **wanted, **blocks,
            )  # fmt: skip
        return sums.sum(1) if whole else _parameter_gradients(dy, h, mean, rstd, wanted)

    return _BACKWARD.launch(launch, h.device, width, h.dtype, dh is not None, seed is not None)


def _parameter_gradients(dy: Tensor, h: Tensor, mean: Tensor, rstd: Tensor, wanted: dict[str, bool]) -> Tensor:
    """The gradients of weight and bias that are wanted, [0 to 2, C], by a pass of their own over the rows [M, C]."""
    n_rows, width = h.shape
    if not any(wanted.values()):
        return h.new_empty(0, width, dtype=torch.float32)

    def launch(options: Config) -> Tensor:
        blocks = {name: options[name] for name in ("BM", "BN", "num_warps")}
        programs = min(options["sums"], runtime.cdiv(n_rows, blocks["BM"]))
        sums = h.new_empty(sum(wanted.values()), programs, width, dtype=torch.float32)
        with runtime.on_device(h):
            _layer_norm_parameters_kernel[(runtime.cdiv(width, blocks["BN"]), programs)](
                dy, h, mean, rstd, sums, n_rows, width,
                runtime.rows_per_program(n_rows, programs, blocks["BM"]),
                dy.stride(0), h.stride(0), **wanted, **blocks,
            )  # fmt: skip
        return sums.sum(1)

    return _PARAMETERS.launch(launch, h.device, width, h.dtype)
