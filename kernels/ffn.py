"""GELU feed-forward: the activation in the epilogue of the up-projection, its derivative in that of the backward.

Two implementations of each pass. "fused" is a Triton matmul with the activation in its epilogue, "unfused" is cuBLAS
and a kernel for the activation. A Triton matmul is slower than cuBLAS's; fusion saves a pass over the hidden layer.
Both save the pre-activation, so the forward and the backward choose independently.

Tiles: b_z, b_h, b_dh and b_dz are [BM, BN] tiles of z = x @ w_up.T + b_up, h = activation(z) and their gradients, all
[M, F] and computed in float32 in steps of BK. x, w, dy, z, h and dz are pointers, or descriptors with DESCRIPTORS.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels import checks, reference, runtime, tile
from kernels.pytorch_internals import addmm_activation
from kernels.tma import has_tma, make_descriptor, supports_tma
from kernels.tuning import Config, Tunable
from kernels.workload import CodegenCase, WarmupCase, Workload

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_LOG2_E = tl.constexpr(1.4426950408889634)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _gate(b_z):
    """0.5 * (1 + tanh(u)) of GELU as sigmoid(2u): the interpreter has no tanh. exp2 is cheaper than exp."""
    slope = -_TWICE_SQRT_2_OVER_PI * _LOG2_E
    cubic = slope * _CUBIC
    return 1.0 / (1.0 + tl.exp2(b_z * (slope + cubic * (b_z * b_z))))


@triton.jit
def _activate(b_z, ACTIVATION: tl.constexpr):
    """The activation of b_z in float32."""
    if ACTIVATION == "relu":
        b_h = tl.maximum(b_z, 0.0)
    elif ACTIVATION == "gelu":
        b_h = 0.5 * b_z * (1.0 + tl.erf(b_z * _SQRT_HALF))
    else:
        b_h = b_z * _gate(b_z)
    return b_h


@triton.jit
def _activate_with_slope(b_z, ACTIVATION: tl.constexpr):
    """The activation of b_z in float32 and its derivative."""
    if ACTIVATION == "relu":
        b_h, slope = tl.maximum(b_z, 0.0), tl.where(b_z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(b_z * _SQRT_HALF))
        b_h, slope = b_z * cdf, cdf + b_z * _INV_SQRT_2PI * tl.exp(-0.5 * b_z * b_z)
    else:
        gate = _gate(b_z)
        b_h = b_z * gate
        du = (1.0 + 3.0 * _CUBIC * b_z * b_z) * _TWICE_SQRT_2_OVER_PI
        slope = gate + b_h * (1.0 - gate) * du
    return b_h, slope


@triton.jit
def _up_tile(
    index, x, w, bias_ptr, h, z, n_rows, n_hidden, width,
    stride_x_row, stride_x_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Write one tile: a matmul, and an epilogue with bias and activation."""
    row, col = tile.grouped_tile(index, n_rows, n_hidden, BM, BN, GROUP)
    b_z = tile.matmul(
        x, w, row, col, n_rows, n_hidden, width, stride_x_row, stride_x_col, stride_w_col, stride_w_row,
        DESCRIPTORS, True, BM, BN, BK, PRECISION,
    )  # [BM, BN]  # fmt: skip
    WIDTH: tl.constexpr = BN // PARTS
    parts = tile.halves(b_z, BM, BN) if PARTS == 2 else (b_z,)  # [BM, WIDTH] each
    for part in tl.static_range(PARTS):
        b_part, first_col = parts[part], col + part * WIDTH
        cols = first_col + tl.arange(0, WIDTH)
        if HAS_BIAS:
            b_part += tl.load(bias_ptr + cols, mask=cols < n_hidden, other=0.0).to(tl.float32)[None, :]  # [WIDTH]
        if SAVE_Z:
            tile.store(z, b_part, row, first_col, n_rows, n_hidden, DESCRIPTORS, BM, WIDTH)
        tile.store(h, _activate(b_part, ACTIVATION), row, first_col, n_rows, n_hidden, DESCRIPTORS, BM, WIDTH)


@triton.jit
def _ffn_up_kernel(
    x, w, bias_ptr, h, z, n_rows, n_hidden, width,
    stride_x_row, stride_x_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_Z: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Write z = x @ w.T + b [n_rows, n_hidden] and h = activation(z).

    With descriptors the kernel is persistent, and the next tile's operands load during an epilogue. With pointers a
    program has one tile: a loop around the pointer arithmetic would cost dozens of registers.
    """
    tiles = tl.cdiv(n_rows, BM) * tl.cdiv(n_hidden, BN)
    if DESCRIPTORS:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _up_tile(
                index, x, w, bias_ptr, h, z, n_rows, n_hidden, width,
                stride_x_row, stride_x_col, stride_w_row, stride_w_col,
                ACTIVATION, HAS_BIAS, SAVE_Z, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
            )  # fmt: skip
    else:
        _up_tile(
            tl.program_id(0), x, w, bias_ptr, h, z, n_rows, n_hidden, width,
            stride_x_row, stride_x_col, stride_w_row, stride_w_col,
            ACTIVATION, HAS_BIAS, SAVE_Z, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
        )  # fmt: skip


@triton.jit
def _down_backward_tile(
    index, dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
    stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, STORE_H: tl.constexpr, BIAS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Write one tile: a matmul, and an epilogue that computes h and dz from z, and the tile's sums of dz."""
    row, col = tile.grouped_tile(index, n_rows, n_hidden, BM, BN, GROUP)
    b_dh = tile.matmul(
        dy, w, row, col, n_rows, n_hidden, width, stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
        DESCRIPTORS, False, BM, BN, BK, PRECISION,
    )  # [BM, BN]  # fmt: skip
    WIDTH: tl.constexpr = BN // PARTS
    parts = tile.halves(b_dh, BM, BN) if PARTS == 2 else (b_dh,)  # [BM, WIDTH] each
    for part in tl.static_range(PARTS):
        first_col = col + part * WIDTH
        b_z = tile.load(z, row, first_col, n_rows, n_hidden, DESCRIPTORS, BM, WIDTH).to(tl.float32)  # [BM, WIDTH]
        b_h, slope = _activate_with_slope(b_z, ACTIVATION)
        if STORE_H:
            tile.store(h, b_h, row, first_col, n_rows, n_hidden, DESCRIPTORS, BM, WIDTH)
        b_dz = parts[part] * slope
        tile.store(dz, b_dz, row, first_col, n_rows, n_hidden, DESCRIPTORS, BM, WIDTH)
        if BIAS_GRADIENT:
            if not DESCRIPTORS:  # rows past the end wrap around to the first ones
                b_dz = tl.where((row + tl.arange(0, BM) < n_rows)[:, None], b_dz, 0.0)
            cols = first_col + tl.arange(0, WIDTH)
            p_sums = sums_ptr + (row // BM).to(tl.int64) * n_hidden + cols
            tl.store(p_sums, tl.sum(b_dz, axis=0), mask=cols < n_hidden)


@triton.jit
def _ffn_down_backward_kernel(
    dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
    stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
    ACTIVATION: tl.constexpr, STORE_H: tl.constexpr, BIAS_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Write dz = (dy @ w) * activation'(z) [n_rows, n_hidden], h = activation(z), and the sums of dz over each tile.

    The loop is that of `_ffn_up_kernel`. sums is [row tiles, n_hidden].
    """
    tiles = tl.cdiv(n_rows, BM) * tl.cdiv(n_hidden, BN)
    if DESCRIPTORS:
        for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _down_backward_tile(
                index, dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
                stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
                ACTIVATION, STORE_H, BIAS_GRADIENT, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
            )  # fmt: skip
    else:
        _down_backward_tile(
            tl.program_id(0), dy, w, z, dz, h, sums_ptr, n_rows, n_hidden, width,
            stride_dy_row, stride_dy_col, stride_w_row, stride_w_col,
            ACTIVATION, STORE_H, BIAS_GRADIENT, PRECISION, DESCRIPTORS, BM, BN, BK, GROUP, PARTS,
        )  # fmt: skip


@triton.jit
def _activation_kernel(z_ptr, h_ptr, n_elements, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Write h = activation(z), both contiguous. h may be the memory of z."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_z = tl.load(z_ptr + elements, mask=elements < n_elements, other=0.0).to(tl.float32)  # [BLOCK]
    b_h = _activate(b_z, ACTIVATION)
    tl.store(h_ptr + elements, b_h.to(h_ptr.dtype.element_ty), mask=elements < n_elements)


@triton.jit
def _activation_backward_kernel(
    dh_ptr, z_ptr, dz_ptr, h_ptr, sums_ptr, n_rows, n_hidden, rows_per_program,
    ACTIVATION: tl.constexpr, STORE_H: tl.constexpr, BIAS_GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write dz = dh * activation'(z) and h = activation(z), [n_rows, n_hidden] each, and sums of dz over rows.

    dz may be the memory of dh. A program processes `rows_per_program` rows of BN columns and writes one row of sums.
    """
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    sums = tl.zeros([BN], dtype=tl.float32)
    for start in range(0, rows_per_program, BM):
        rows = first + start + tl.arange(0, BM)
        mask = (rows < n_rows)[:, None] & (cols < n_hidden)[None, :]
        offsets = rows[:, None] * n_hidden + cols[None, :]
        b_z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        b_dh = tl.load(dh_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
        b_h, slope = _activate_with_slope(b_z, ACTIVATION)
        b_dz = b_dh * slope
        if STORE_H:
            tl.store(h_ptr + offsets, b_h.to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + offsets, b_dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if BIAS_GRADIENT:
            sums += tl.sum(b_dz, axis=0)
    if BIAS_GRADIENT:
        tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * n_hidden + cols, sums, mask=cols < n_hidden)


# Estimates for shapes without a measurement. On an H200 (700 TFLOP/s, 4.3 TB/s) a read and a write of the hidden layer
# take 325 / C of the time of a matmul with inner size C, on an A100 294 / C. Triton's matmuls take a ninth longer.
_PASS, _SLOWDOWN = 325, 0.11
_FEW_ROWS = 64  # up to here reading the weight dominates a matmul, and cuBLAS splits that better
_LONG = 2048  # inner sizes from here on hide the epilogue
_UNFUSED: Config = {"implementation": "unfused"}


def _fused(
    descriptors: bool, block: tuple[int, int, int], warps: int, stages: int, parts: int, per_processor: int
) -> Config:
    """Return a fused configuration. `block` is BM, BN, BK; persistent kernels run `per_processor` programs on each."""
    names = ("BM", "BN", "BK")
    return {
        "implementation": "fused", "DESCRIPTORS": descriptors, **dict(zip(names, block, strict=True)), "GROUP": 8,
        "PARTS": parts, "num_warps": warps, "num_stages": stages, "per_processor": per_processor,
    }  # fmt: skip


_POINTERS_FLOAT32 = _fused(False, (64, 64, 32), 4, 2, 1, 1)
_POINTERS = _fused(False, (128, 128, 64), 8, 3, 2, 1)
_POINTERS_SMALL = _fused(False, (128, 128, 32), 8, 4, 2, 1)  # for chips with less shared memory
# two programs on a processor: one multiplies during the other's epilogue, which is long where C is short
_UP_OVERLAPPED = _fused(True, (128, 128, 64), 8, 3, 2, 2)
_UP_WIDE = _fused(True, (128, 256, 64), 8, 3, 2, 1)
_DOWN_OVERLAPPED = _fused(True, (128, 64, 64), 8, 3, 1, 2)
_DOWN_WIDE = _fused(True, (128, 128, 64), 8, 3, 2, 1)


def _fused_configs(
    architecture: str, forward: bool, width: int, dtype: torch.dtype, activation: str, aligned: bool
) -> list[Config]:
    """Return the configurations of the fused matmul, the likeliest first. None of them spills registers."""
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
        # it fits in the registers of two programs, but ptxas needs the limit to arrange that
        overlapped = {**overlapped, "maxnreg": 128}
    if architecture.startswith("sm_10") and not forward:
        return [overlapped, *pointers]
    return [wide, overlapped, *pointers] if width >= _LONG else [overlapped, wide, *pointers]


def _configs(fusing_wins: bool, implementation: str, fused: list[Config]) -> list[Config]:
    if implementation == "auto":
        return [*fused, _UNFUSED] if fusing_wins else [_UNFUSED, *fused]
    return fused if implementation == "fused" else [_UNFUSED]


def _up_configs(
    architecture: str, rows: int, width: int, dtype: torch.dtype, activation: str, has_bias: bool, save_z: bool,
    aligned: bool, implementation: str,
) -> list[Config]:  # fmt: skip
    saved = _PASS / width
    if save_z:  # the pre-activation is written in any case
        saved /= 2
    elif has_bias and _cublas_fuses(activation):
        saved = 0.0
    wins = dtype != torch.float32 and rows > _FEW_ROWS and saved > _SLOWDOWN
    return _configs(wins, implementation, _fused_configs(architecture, True, width, dtype, activation, aligned))


def _down_backward_configs(
    architecture: str, rows: int, width: int, dtype: torch.dtype, activation: str, bias_gradient: bool, aligned: bool,
    implementation: str,
) -> list[Config]:  # fmt: skip
    wins = dtype != torch.float32 and rows > _FEW_ROWS and _PASS / width > _SLOWDOWN
    return _configs(wins, implementation, _fused_configs(architecture, False, width, dtype, activation, aligned))


_UP = Tunable("ffn_up", _up_configs)
_DOWN_BACKWARD = Tunable("ffn_down_backward", _down_backward_configs)
_ACTIVATION = Tunable("ffn_activation", lambda architecture, dtype: [{"BLOCK": 2048, "num_warps": 4}])
_ACTIVATION_BACKWARD = Tunable(
    "ffn_activation_backward",
    lambda architecture, dtype: [{"BM": 16, "BN": 128, "num_warps": 4, "sums": 64}],
)


def _cublas_fuses(activation: str) -> bool:
    """Return True if cuBLAS has this activation as an epilogue. The CPU's `addmm_activation` has GELU by erf."""
    return activation != "gelu" and not tile.INTERPRETED.value


def _rows_key(n_rows: int) -> int:
    """Return the tuning key of `n_rows`: sizes up to the same power of two share a configuration."""
    return min(runtime.next_power_of_2(n_rows), 65_536)


def _launch_options(config: Config) -> Config:
    return {name: value for name, value in config.items() if name not in ("implementation", "per_processor")}


def _grid(n_rows: int, n_hidden: int, config: Config, device: torch.device) -> tuple[int]:
    tiles = runtime.cdiv(n_rows, config["BM"]) * runtime.cdiv(n_hidden, config["BN"])
    return (min(tiles, runtime.program_count(device, config["per_processor"])) if config["DESCRIPTORS"] else tiles,)


def launch_up(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str, save_z: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """Compute h = activation(z) and z = x @ w.T + b, [M, F] each, for x [M, C] with M >= 1.

    z is empty unless `save_z`.
    """
    n_rows, width = x.shape
    n_hidden = w.shape[0]
    aligned = supports_tma(x, w) and n_hidden * x.itemsize % 16 == 0

    def run(config: Config) -> tuple[Tensor, Tensor]:
        if config["implementation"] == "unfused":
            return _up_unfused(x, w, b, activation, save_z)
        h = x.new_empty(n_rows, n_hidden)
        z = x.new_empty(n_rows if save_z else 0, n_hidden)
        tensors: tuple[Any, ...] = (x, w, b, h, z)
        if config["DESCRIPTORS"]:
            rows, cols, inner, part = config["BM"], config["BN"], config["BK"], config["BN"] // config["PARTS"]
            tensors = (
                make_descriptor(x, rows, inner), make_descriptor(w, cols, inner), b,
                make_descriptor(h, rows, part), make_descriptor(z if save_z else None, rows, part),
            )  # fmt: skip
        with runtime.on_device(x):
            _ffn_up_kernel[_grid(n_rows, n_hidden, config, x.device)](
                *tensors, n_rows, n_hidden, width, *x.stride(), *w.stride(),
                ACTIVATION=activation, HAS_BIAS=b is not None, SAVE_Z=save_z,
                PRECISION=runtime.dot_precision(x.dtype), **_launch_options(config),
            )  # fmt: skip
        return h, z

    return _UP.launch(
        run, x.device, _rows_key(n_rows), width, x.dtype, activation, b is not None, save_z, aligned, implementation
    )


def _up_unfused(x: Tensor, w: Tensor, b: Tensor | None, activation: str, save_z: bool) -> tuple[Tensor, Tensor]:
    if not save_z and b is not None and _cublas_fuses(activation):
        return addmm_activation(b, x, w.t(), use_gelu=activation == "gelu_tanh"), x.new_empty(0, w.shape[0])
    z = torch.nn.functional.linear(x, w, b)  # [M, F]
    h = torch.empty_like(z) if save_z else z

    def run(config: Config) -> None:
        with runtime.on_device(x):
            _activation_kernel[(runtime.cdiv(z.numel(), config["BLOCK"]),)](
                z, h, z.numel(), ACTIVATION=activation, **config
            )

    _ACTIVATION.launch(run, x.device, x.dtype)
    return h, z if save_z else z.new_empty(0, w.shape[0])


def _launch_down_backward(
    dy: Tensor, w: Tensor, z: Tensor, activation: str, store_h: bool, bias_gradient: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dz = (dy @ w) * activation'(z), h = activation(z) and dz.sum(0) in float32, for dy [M, C] with M >= 1.

    h is empty unless `store_h`, the sum is zero unless `bias_gradient`.
    """
    n_rows, width = dy.shape
    n_hidden = w.shape[1]
    aligned = supports_tma(dy, w, z)

    def run(config: Config) -> tuple[Tensor, Tensor, Tensor]:
        if config["implementation"] == "unfused":
            return _down_backward_unfused(dy, w, z, activation, store_h, bias_gradient)
        dz = torch.empty_like(z)
        h = z.new_empty(n_rows if store_h else 0, n_hidden)
        # each row of tiles has its sums, added below in a fixed order: the same bits on every run
        sums = dy.new_empty(runtime.cdiv(n_rows, config["BM"]) if bias_gradient else 0, n_hidden, dtype=torch.float32)
        tensors: tuple[Any, ...] = (dy, w, z, dz, h)
        if config["DESCRIPTORS"]:
            rows, cols, inner, part = config["BM"], config["BN"], config["BK"], config["BN"] // config["PARTS"]
            tensors = (
                make_descriptor(dy, rows, inner), make_descriptor(w, inner, cols), make_descriptor(z, rows, part),
                make_descriptor(dz, rows, part), make_descriptor(h if store_h else None, rows, part),
            )  # fmt: skip
        with runtime.on_device(dy):
            _ffn_down_backward_kernel[_grid(n_rows, n_hidden, config, dy.device)](
                *tensors, sums, n_rows, n_hidden, width, *dy.stride(), *w.stride(),
                ACTIVATION=activation, STORE_H=store_h, BIAS_GRADIENT=bias_gradient,
                PRECISION=runtime.dot_precision(dy.dtype), **_launch_options(config),
            )  # fmt: skip
        return dz, h, sums.sum(0)

    return _DOWN_BACKWARD.launch(
        run, dy.device, _rows_key(n_rows), width, dy.dtype, activation, bias_gradient, aligned, implementation
    )


def _down_backward_unfused(
    dy: Tensor, w: Tensor, z: Tensor, activation: str, store_h: bool, bias_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz = dy @ w  # [M, F]: dh, overwritten by dz
    n_rows, n_hidden = z.shape
    h = z.new_empty(n_rows if store_h else 0, n_hidden)

    def run(config: Config) -> Tensor:
        blocks = {name: config[name] for name in ("BM", "BN", "num_warps")}
        programs = min(config["sums"], runtime.cdiv(n_rows, blocks["BM"]))
        sums = dy.new_empty(programs if bias_gradient else 0, n_hidden, dtype=torch.float32)
        with runtime.on_device(dy):
            _activation_backward_kernel[(runtime.cdiv(n_hidden, blocks["BN"]), programs)](
                dz, z, dz, h, sums, n_rows, n_hidden, runtime.rows_per_program(n_rows, programs, blocks["BM"]),
                ACTIVATION=activation, STORE_H=store_h, BIAS_GRADIENT=bias_gradient, **blocks,
            )  # fmt: skip
        return sums.sum(0)

    return dz, h, _ACTIVATION_BACKWARD.launch(run, dy.device, dy.dtype)


def _compute(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, activation: str, save_z: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = x.reshape(-1, x.shape[-1])  # [M, C]
    if rows.shape[0] == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(0, w_up.shape[0])
    # under autocast, parameters are in a wider dtype than x, and their gradients keep that precision
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
    """Gradients of x, w_up, b_up, w_down and b_down where `needed`, else empty tensors; those of biases in float32."""
    width = x.shape[-1]
    rows, dy_rows = x.reshape(-1, width), dy.reshape(-1, width)  # [M, C]
    if rows.shape[0] == 0:
        return [gradient.zero_() for gradient in _empty_gradients(x, w_up, w_down, needed)]
    up, down = w_up.to(x.dtype), w_down.to(x.dtype)
    dz = h = db_up = rows  # placeholders, unused if only b_down needs a gradient
    if any(needed[:4]):
        dz, h, db_up = _launch_down_backward(dy_rows, down, z, activation, needed[3], needed[2], implementation)
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
    """Return dz.T @ x, summed over all rows in float32: cuBLAS may add split-K parts in half precision."""
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
    matmuls = 1 + sum(needed[i] for i in (0, 1, 3))
    return 2 * matmuls * x_shape.numel() * w_up_shape[0]


@reference.document_arguments
def gelu_ffn(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, activation: str = "gelu_tanh",
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Apply the feed-forward of a transformer block: activation(x @ w_up.T + b_up) @ w_down.T + b_down.

    GELU is from Hendrycks and Gimpel 2016 (arXiv:1606.08415). The backward recomputes the activation from the saved
    pre-activation. Two implementations: "fused" runs Triton matmuls with the bias and the activation, or its
    derivative, in their epilogues; "unfused" runs cuBLAS and one kernel for the activation. Fusion saves a pass over
    the hidden layer and costs some of the matmul's speed, so it wins where C is small. All other matmuls are cuBLAS's.
    Matmuls accumulate in float32; float32 inputs follow `torch.get_float32_matmul_precision()`. The result is
    contiguous. A second derivative raises RuntimeError.
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
