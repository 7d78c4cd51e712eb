"""Launches of the feed-forward's kernels: which implementation, its configuration, allocation, and the grid.

Two implementations of each pass. "fused": a Triton product with the activation in its epilogue. "unfused": cuBLAS for
the product, then one kernel for the activation. A Triton product is slower than cuBLAS's; what the fusion saves is a
pass over the hidden layer. Both keep the pre-activation, so that each pass chooses for itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import runtime, tile
from kernels.ffn_kernels import (
    _activation_backward_kernel,
    _activation_kernel,
    _ffn_down_backward_kernel,
    _ffn_up_kernel,
)
from kernels.pytorch_internals import addmm_activation
from kernels.tma import has_tma, make_descriptor, supports_tma
from kernels.tuning import Config, Tunable

# What is estimated until it is measured: on an H200 (700 TFLOP/s, 4.3 TB/s) reading and writing the hidden layer
# takes 325 / C of the time of a product with inner size C, on an A100 294 / C; Triton's products take a ninth longer.
_PASS, _SLOWDOWN = 325, 0.11
_FEW_ROWS = 64  # up to here a product is the time of reading its weight, which cuBLAS splits better
_UNFUSED: Config = {"implementation": "unfused"}


def _fused(
    descriptors: bool, block: tuple[int, int, int], warps: int, stages: int, parts: int, programs: int
) -> Config:
    """`block` is BM, BN, BK; the epilogue has `parts`; of persistent kernels `programs` run on each processor."""
    names = ("BM", "BN", "BK")
    return {
        "implementation": "fused", "DESCRIPTORS": descriptors, **dict(zip(names, block, strict=True)), "GROUP": 8,
        "PARTS": parts, "num_warps": warps, "num_stages": stages, "per_processor": programs,
    }  # fmt: skip


_POINTERS_FLOAT32 = _fused(False, (64, 64, 32), 4, 2, 1, 1)
_POINTERS = _fused(False, (128, 128, 64), 8, 3, 2, 1)
_POINTERS_SMALL = _fused(False, (128, 128, 32), 8, 4, 2, 1)  # for chips with less shared memory
# two programs on a processor: one multiplies while the other is in its epilogue, which is long where C is short
_UP_OVERLAPPED = _fused(True, (128, 128, 64), 8, 3, 2, 2)
_UP_WIDE = _fused(True, (128, 256, 64), 8, 3, 2, 1)
_DOWN_OVERLAPPED = _fused(True, (128, 64, 64), 8, 3, 1, 2)
_DOWN_WIDE = _fused(True, (128, 128, 64), 8, 3, 2, 1)
_LONG = 2048  # inner sizes from here on hide the epilogue


def _fused_options(
    architecture: str, forward: bool, width: int, dtype: torch.dtype, activation: str, aligned: bool
) -> list[Config]:
    """The configurations of the fused product, the likeliest first: all keep everything in registers there."""
    if dtype == torch.float32:
        return [_POINTERS_FLOAT32]
    small = architecture in ("sm_86", "sm_89") or architecture.startswith(("sm_12", "gfx"))
    pointers = [_POINTERS_SMALL if small else _POINTERS]
    if not aligned or not has_tma(architecture):
        return pointers
    if architecture.startswith("sm_12"):
        return [_UP_OVERLAPPED if forward else _DOWN_WIDE, *pointers]
    overlapped, wide = (_UP_OVERLAPPED, _UP_WIDE) if forward else (_DOWN_OVERLAPPED, _DOWN_WIDE)
    if activation == "gelu_tanh":
        # it fits in the registers that each of two programs has, which the compiler is to be told
        overlapped = {**overlapped, "maxnreg": 128}
    if architecture.startswith("sm_10") and not forward:
        return [overlapped, *pointers]
    return [wide, overlapped, *pointers] if width >= _LONG else [overlapped, wide, *pointers]


def _choices(fusing_wins: bool, implementation: str, fused: list[Config]) -> list[Config]:
    if implementation == "auto":
        return [*fused, _UNFUSED] if fusing_wins else [_UNFUSED, *fused]
    return fused if implementation == "fused" else [_UNFUSED]


def _up_choices(
    architecture: str, rows: int, width: int, dtype: torch.dtype, activation: str, has_bias: bool, save_z: bool,
    aligned: bool, implementation: str,
) -> list[Config]:  # fmt: skip
    saved = _PASS / width
    if save_z:  # the pre-activation is written anyway
        saved /= 2
    elif has_bias and _has_own_epilogue(activation):
        saved = 0.0
    wins = dtype != torch.float32 and rows > _FEW_ROWS and saved > _SLOWDOWN
    return _choices(wins, implementation, _fused_options(architecture, True, width, dtype, activation, aligned))


def _down_backward_choices(
    architecture: str, rows: int, width: int, dtype: torch.dtype, activation: str, bias_gradient: bool, aligned: bool,
    implementation: str,
) -> list[Config]:  # fmt: skip
    wins = dtype != torch.float32 and rows > _FEW_ROWS and _PASS / width > _SLOWDOWN
    return _choices(wins, implementation, _fused_options(architecture, False, width, dtype, activation, aligned))


_UP = Tunable("ffn_up", _up_choices)
_DOWN_BACKWARD = Tunable("ffn_down_backward", _down_backward_choices)
# of the activation alone
_ACTIVATION = Tunable("ffn_activation", lambda architecture, dtype: [{"BLOCK": 2048, "num_warps": 4}])
_ACTIVATION_BACKWARD = Tunable(
    "ffn_activation_backward",
    lambda architecture, dtype: [{"BM": 16, "BN": 128, "num_warps": 4, "sums": 64}],
)


def _has_own_epilogue(activation: str) -> bool:
    """Whether cuBLAS computes this activation after a product with a bias. The CPU's library has the GELU by erf."""
    return activation != "gelu" and not tile.INTERPRETED.value


def _rows_like(n_rows: int) -> int:
    """The numbers of rows that share a choice: up to a power of two."""
    return min(runtime.next_power_of_2(n_rows), 65_536)


def _launch_options(options: Config) -> Config:
    return {name: value for name, value in options.items() if name not in ("implementation", "per_processor")}


def _grid(n_rows: int, n_hidden: int, options: Config, device: torch.device) -> tuple[int]:
    tiles = runtime.cdiv(n_rows, options["BM"]) * runtime.cdiv(n_hidden, options["BN"])
    return (min(tiles, runtime.program_count(device, options["per_processor"])) if options["DESCRIPTORS"] else tiles,)


def launch_up(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, save_z: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """Compute h = activation(z) and z = x @ w.T + b, [M, F] each, for x [M, C] with M >= 1.

    z has no rows unless it is saved.
    """
    n_rows, width = x.shape
    n_hidden = w.shape[0]
    aligned = supports_tma(x, w) and n_hidden * x.itemsize % 16 == 0

    def launch(options: Config) -> tuple[Tensor, Tensor]:
        if options["implementation"] == "unfused":
            return _up_unfused(x, w, b, activation, save_z)
        h = x.new_empty(n_rows, n_hidden)
        z = x.new_empty(n_rows if save_z else 0, n_hidden)
        tensors: tuple[Any, ...] = (x, w, b, h, z)
        if options["DESCRIPTORS"]:
            rows, cols, inner, part = options["BM"], options["BN"], options["BK"], options["BN"] // options["PARTS"]
            tensors = (
                make_descriptor(x, rows, inner), make_descriptor(w, cols, inner), b,
                make_descriptor(h, rows, part), make_descriptor(z if save_z else None, rows, part),
            )  # fmt: skip
        with runtime.on_device(x):
            _ffn_up_kernel[_grid(n_rows, n_hidden, options, x.device)](
                *tensors, n_rows, n_hidden, width, *x.stride(), *w.stride(),
                ACTIVATION=activation, HAS_BIAS=b is not None, SAVE_Z=save_z,
                PRECISION=runtime.dot_precision(x.dtype), **_launch_options(options),
            )  # fmt: skip
        return h, z

    return _UP.launch(
        launch, x.device,
        _rows_like(n_rows), width, x.dtype, activation, b is not None, save_z, aligned, implementation,
    )  # fmt: skip


def _up_unfused(x: Tensor, w: Tensor, b: Tensor | None, activation: str, save_z: bool) -> tuple[Tensor, Tensor]:
    if not save_z and b is not None and _has_own_epilogue(activation):
        return addmm_activation(b, x, w.t(), use_gelu=activation == "gelu_tanh"), x.new_empty(0, w.shape[0])
    z = torch.nn.functional.linear(x, w, b)  # [M, F]
    h = torch.empty_like(z) if save_z else z

    def launch(options: Config) -> None:
        with runtime.on_device(x):
            _activation_kernel[(runtime.cdiv(z.numel(), options["BLOCK"]),)](
                z, h, z.numel(), ACTIVATION=activation, **options
            )

    _ACTIVATION.launch(launch, x.device, x.dtype)
    return h, z if save_z else z.new_empty(0, w.shape[0])


def launch_down_backward(
    dy: Tensor, w: Tensor, z: Tensor, activation: str, store_h: bool, bias_gradient: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dz = (dy @ w) * activation'(z), h = activation(z) and dz summed over rows, from dy [M, C] with M >= 1.

    h has no rows and the sum, which is in float32, is zero unless they are asked for.
    """
    n_rows, width = dy.shape
    n_hidden = w.shape[1]
    aligned = supports_tma(dy, w, z)

    def launch(options: Config) -> tuple[Tensor, Tensor, Tensor]:
        if options["implementation"] == "unfused":
            return _down_backward_unfused(dy, w, z, activation, store_h, bias_gradient)
        dz = torch.empty_like(z)
        h = z.new_empty(n_rows if store_h else 0, n_hidden)
        # a row for each row of tiles, added below in a fixed order: the same bits on every run
        sums = dy.new_empty(runtime.cdiv(n_rows, options["BM"]) if bias_gradient else 0, n_hidden, dtype=torch.float32)
        tensors: tuple[Any, ...] = (dy, w, z, dz, h)
        if options["DESCRIPTORS"]:
            rows, cols, inner, part = options["BM"], options["BN"], options["BK"], options["BN"] // options["PARTS"]
            tensors = (
                make_descriptor(dy, rows, inner), make_descriptor(w, inner, cols), make_descriptor(z, rows, part),
                make_descriptor(dz, rows, part), make_descriptor(h if store_h else None, rows, part),
            )  # fmt: skip
        with runtime.on_device(dy):
            _ffn_down_backward_kernel[_grid(n_rows, n_hidden, options, dy.device)](
                *tensors, sums, n_rows, n_hidden, width, *dy.stride(), *w.stride(),
                ACTIVATION=activation, STORE_H=store_h, BIAS_GRADIENT=bias_gradient,
                PRECISION=runtime.dot_precision(dy.dtype), **_launch_options(options),
            )  # fmt: skip
        return dz, h, sums.sum(0)

    return _DOWN_BACKWARD.launch(
        launch, dy.device,
        _rows_like(n_rows), width, dy.dtype, activation, bias_gradient, aligned, implementation,
    )  # fmt: skip


def _down_backward_unfused(
    dy: Tensor, w: Tensor, z: Tensor, activation: str, store_h: bool, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz = dy @ w  # [M, F]: dh, overwritten by dz
    n_rows, n_hidden = z.shape
    h = z.new_empty(n_rows if store_h else 0, n_hidden)

    def launch(options: Config) -> Tensor:
        blocks = {name: options[name] for name in ("BM", "BN", "num_warps")}
        programs = min(options["sums"], runtime.cdiv(n_rows, blocks["BM"]))
        sums = dy.new_empty(programs if bias_gradient else 0, n_hidden, dtype=torch.float32)
        with runtime.on_device(dy):
            _activation_backward_kernel[(runtime.cdiv(n_hidden, blocks["BN"]), programs)](
                dz, z, dz, h, sums, n_rows, n_hidden,
                runtime.rows_per_program(n_rows, programs, blocks["BM"]),
                ACTIVATION=activation, STORE_H=store_h, BIAS_GRADIENT=bias_gradient, **blocks,
            )  # fmt: skip
        return sums.sum(0)

    return dz, h, _ACTIVATION_BACKWARD.launch(launch, dy.device, dy.dtype)
