"""Launches of attention's kernels: the configurations to choose from, allocation, and the grid."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import philox, runtime
from kernels.attention_kernels import (
    _attention_delta_kernel,
    _attention_dk_dv_kernel,
    _attention_dq_kernel,
    _attention_forward_kernel,
)
from kernels.tma import has_tma, make_descriptor, supports_tma
from kernels.tuning import Config, Tunable

Blocks = tuple[int, int, int, int]  # BM, BN, num_warps, num_stages
_LONGEST_TILE = 128  # of queries; the backward's statistics of them are padded to a multiple

# By pass, then for head sizes up to 64, 128 and 256: what keeps everything in registers and fits in shared memory with
# Triton 3.6, 3.7 and 3.9. The random numbers of dropout take registers of their own.
_POINTERS_HALF: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
    "dk_dv": ((32, 128, 8, 2), (16, 128, 8, 2), (32, 32, 8, 1)),
    "dq": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
}
_FLOAT32: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dk_dv": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dq": ((32, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}
_FLOAT32_DROPOUT: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "dk_dv": ((32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
    "dq": ((32, 16, 4, 1), (16, 16, 8, 1), (16, 16, 8, 2)),
}
# AMD's: warps of 64 threads, 64 KiB of shared memory and no copies in the background
_AMD_HALF: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 4, 1)),
    "dk_dv": ((32, 64, 8, 1), (16, 64, 8, 1), (16, 32, 8, 1)),
    "dq": ((64, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
}
_AMD_FLOAT32: dict[str, tuple[Blocks, Blocks, Blocks]] = {
    "forward": ((32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1)),
    "dk_dv": ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
    "dq": ((32, 16, 8, 1), (32, 16, 8, 1), (16, 16, 4, 1)),
}
# By tensor descriptors; where there is none the pointers' blocks are taken. The next tile is asked for when one is done
# with: only from three stages on it is there when its turn comes. Tiles of 64 rows are those of four warps, the group
# that multiplies together; eight would share them out and read the other operand twice.
_DESCRIPTORS: dict[str, tuple[Blocks | None, ...]] = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 2)),
    "dk_dv": ((64, 64, 4, 3), (32, 64, 4, 3), None),
    "dq": ((128, 64, 8, 3), (128, 64, 8, 3), None),
}
_DESCRIPTORS_DROPOUT: dict[str, tuple[Blocks | None, ...]] = {
    "forward": ((128, 64, 8, 3), (64, 32, 4, 3), (128, 32, 8, 2)),
    "dk_dv": ((64, 64, 4, 3), (32, 64, 4, 3), None),
    "dq": ((64, 64, 4, 3), (64, 32, 4, 3), None),
}
# what a measurement tries beside them
_OTHER_DESCRIPTORS: dict[str, tuple[tuple[Blocks, ...], ...]] = {
    "forward": (((128, 64, 4, 3), (128, 128, 8, 3)), ((128, 32, 8, 3), (128, 128, 8, 3)), ()),
    "dk_dv": (((64, 128, 8, 3), (32, 64, 4, 3)), ((32, 128, 8, 3),), ()),
    "dq": (((128, 64, 4, 3), (64, 64, 4, 3)), ((64, 64, 4, 2), (64, 32, 4, 3)), ()),
}
_OTHER_DESCRIPTORS_DROPOUT: dict[str, tuple[tuple[Blocks, ...], ...]] = {
    "forward": (((64, 64, 4, 3),), ((64, 64, 4, 3), (128, 64, 8, 3)), ()),
    "dk_dv": (((32, 64, 4, 3),), ((16, 64, 4, 3),), ()),
    "dq": ((), ((128, 64, 8, 3),), ()),
}


def _pointers(pass_name: str, architecture: str, size: int, dtype: torch.dtype, dropout: bool) -> Blocks:
    if architecture.startswith("gfx"):
        return (_AMD_FLOAT32 if dtype == torch.float32 else _AMD_HALF)[pass_name][size]
    if dtype == torch.float32:
        return (_FLOAT32_DROPOUT if dropout else _FLOAT32)[pass_name][size]
    return _POINTERS_HALF[pass_name][size]


def _choices(
    pass_name: str, architecture: str, head_size: int, keys: int, dtype: torch.dtype, dropout: bool, described: bool
) -> list[Config]:
    """The configurations of the pass `forward`, `dk_dv` or `dq`, the likeliest first."""
    size = 0 if head_size <= 64 else 1 if head_size == 128 else 2
    pointers = _options(False, _pointers(pass_name, architecture, size, dtype, dropout))
    few_registers = architecture.startswith("sm_12")  # products there take their operands through registers
    first = (_DESCRIPTORS_DROPOUT if dropout else _DESCRIPTORS)[pass_name][size]
    if (
        first is None
        or not described
        or not has_tma(architecture)
        or (few_registers and (pass_name != "forward" or size + dropout > 1))
    ):
        return [pointers]
    others = () if few_registers else (_OTHER_DESCRIPTORS_DROPOUT if dropout else _OTHER_DESCRIPTORS)[pass_name][size]
    return [_options(True, blocks) for blocks in (first, *others)] + [pointers]


def _options(descriptors: bool, blocks: Blocks) -> Config:
    names = ("BM", "BN", "num_warps", "num_stages")
    return {"DESCRIPTORS": descriptors, **dict(zip(names, blocks, strict=True))}


_FORWARD, _DK_DV, _DQ = (Tunable(f"attention_{name}", partial(_choices, name)) for name in ("forward", "dk_dv", "dq"))


def _problem(q: Tensor, k: Tensor, seed: Tensor | None, described: bool) -> tuple[Any, ...]:
    """What the choice depends on: padded head size, keys up to a power of two, dtype, dropout, descriptors."""
    return (
        runtime.padded_head_size(q.shape[3]),
        runtime.next_power_of_2(k.shape[2]),
        q.dtype,
        seed is not None,
        described,
    )


def _constants(q: Tensor, seed: Tensor | None, options: Config) -> Config:
    return {
        "D": q.shape[3],
        "BD": runtime.padded_head_size(q.shape[3]),
        "DROPOUT": seed is not None,
        "PRECISION": runtime.dot_precision(q.dtype),
        **options,
    }


def _operands(options: Config, head_size: int, *tensors: tuple[Tensor, str]) -> list[Any]:
    """The tensors [B, H, rows, D] as a kernel takes them: each with the name of the size of its tiles, BM or BN."""
    if not options["DESCRIPTORS"]:
        return [tensor for tensor, _ in tensors]
    return [
        make_descriptor(tensor, 1, 1, options[rows], runtime.padded_head_size(head_size)) for tensor, rows in tensors
    ]


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    """Write o [B, H, T, D]; return the log2-sum-exp2 of each query's scores, [B, H, T] in float32."""
    batch, heads, n_queries, head_size = q.shape
    lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q.device)
    if o.numel() == 0:
        return lse
    if scale < 0.0:  # the kernel scales the greatest of products, not the products
        q, scale = -q, -scale
    strides = [stride for tensor in (q, k, v, o) for stride in tensor.stride()[:3]]

    def launch(options: Config) -> None:
        operands = _operands(options, head_size, (q, "BM"), (k, "BN"), (v, "BN"), (o, "BM"))
        with runtime.on_device(q):
            _attention_forward_kernel[(runtime.cdiv(n_queries, options["BM"]) * batch * heads,)](
                *operands, lse, seed, *strides,
                heads, batch * heads, n_queries, k.shape[2], scale * runtime.LOG2_E,
                *philox.dropout_constants(dropout_p),
                **_constants(q, seed, options),
            )  # fmt: skip

    _FORWARD.launch(launch, q.device, *_problem(q, k, seed, supports_tma(q, k, v, o)))
    return lse


def launch_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    scale: float, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    """Write dq [B, H, T, D], dk and dv [B, H, S, D], these two of the same strides."""
    batch, heads, n_queries, head_size = q.shape
    n_keys = k.shape[2]
    if o.numel() == 0:
        dk.zero_()
        dv.zero_()
        return
    n_padded = runtime.cdiv(n_queries, _LONGEST_TILE) * _LONGEST_TILE
    padded_lse, delta = torch.empty(2, batch, heads, n_padded, dtype=torch.float32, device=q.device)
    inputs = [stride for tensor in (q, k, v, do) for stride in tensor.stride()[:3]]
    sizes = (
        heads,
        batch * heads,
        n_queries,
        n_keys,
        n_padded,
        scale,
        scale * runtime.LOG2_E,
        *philox.dropout_constants(dropout_p),
    )
    rows = max(16, 2048 // runtime.padded_head_size(head_size))
    with runtime.on_device(q):
        _attention_delta_kernel[(n_padded // rows * batch * heads,)](
            o, do, lse, padded_lse, delta, *o.stride()[:3], *do.stride()[:3], heads, n_queries, n_padded,
            BM=rows, D=head_size, BD=runtime.padded_head_size(head_size),
        )  # fmt: skip

    def launch_dk_dv(options: Config) -> None:
        *sources, b_dk, b_dv = _operands(
            options, head_size, (q, "BM"), (k, "BN"), (v, "BN"), (do, "BM"), (dk, "BN"), (dv, "BN")
        )
        with runtime.on_device(q):
            _attention_dk_dv_kernel[(runtime.cdiv(n_keys, options["BN"]) * batch * heads,)](
                *sources, padded_lse, delta, b_dk, b_dv, seed, *inputs, *dk.stride()[:3], *sizes,
                **_constants(q, seed, options),
            )  # fmt: skip

    def launch_dq(options: Config) -> None:
        *sources, b_dq = _operands(options, head_size, (q, "BM"), (k, "BN"), (v, "BN"), (do, "BM"), (dq, "BM"))
        with runtime.on_device(q):
            _attention_dq_kernel[(runtime.cdiv(n_queries, options["BM"]) * batch * heads,)](
                *sources, padded_lse, delta, b_dq, seed, *inputs, *dq.stride()[:3], *sizes,
                **_constants(q, seed, options),
            )  # fmt: skip

    described = supports_tma(q, k, v, do)
    _DK_DV.launch(launch_dk_dv, q.device, *_problem(q, k, seed, described and supports_tma(dk, dv)))
    _DQ.launch(launch_dq, q.device, *_problem(q, k, seed, described and supports_tma(dq)))
