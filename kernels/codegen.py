"""Ahead-of-time compilation of every kernel for GPUs that are not there, and what came out.

`python -m kernels.codegen` prints registers, spills, shared memory and instruction counts of each kernel, as the
operators launch it, for each target. No GPU is needed: the launches are recorded on CPU tensors, then compiled.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import attention, ffn, norm, tile
from kernels.checks import ACTIVATIONS

# bytes that one program may use: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
SHARED_MEMORY_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}

_TYPE_OF_DTYPE = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch as an operator made it: the function, its arguments by name and its compiler options."""

    case: str
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What one launch compiles to: resources of one program, and counts of the instructions that decide its speed."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_core_instructions: int


def record(case: str, function: Callable[..., object], *arguments: object) -> list[Launch]:
    """Call an operator's host function with kernel launches recorded and not executed.

    Raises:
        RuntimeError: nothing was launched, or kernels are interpreted, which cannot be recorded.
    """
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        options: dict[str, int] = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        by_name = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(case, kernel, by_name, options))

    with patch.object(JITFunction, "run", run):
        function(*arguments)
    if not launches:
        raise RuntimeError(f"{case}: no launch of a kernel was recorded")
    return launches


def operator_launches(dtype: torch.dtype) -> list[Launch]:
    """Every kernel of every operator at GPT-2's shapes, forward and backward, in `dtype`."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    launches: list[Launch] = []
    for width in (768, 4096):
        case, x, w = f"layer_norm C={width}", tensor(64, width), tensor(width)
        statistics = tensor(64, dtype=torch.float32)
        launches += record(case, norm._forward, x, w, w, 1e-5)
        launches += record(case, norm._backward, x, x, w, statistics, statistics, True)
    x, w_up, w_down, z = tensor(128, 768), tensor(3072, 768), tensor(768, 3072), tensor(128, 3072)
    for activation in ACTIVATIONS:
        case = f"gelu_ffn {activation}"
        launches += record(case, ffn._forward, x, w_up, tensor(3072), w_down, None, activation, True)
        launches += record(case, ffn._backward, x, x, w_up, w_down, z, activation, [False] * 5)
    for head_size in (64, 128, 256):
        q, lse = tensor(1, 2, 256, head_size), tensor(1, 2, 256, dtype=torch.float32)
        for seed in (None, torch.zeros(1, dtype=torch.int64)):
            case = f"causal_attention D={head_size}" + ("" if seed is None else " dropout")
            launches += record(case, attention._forward, q, q, q, 0.1, 0.1, seed)
            launches += record(case, attention._backward, q, q, q, q, q, lse, 0.1, 0.1, seed)
    return launches


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile a recorded launch for the NVIDIA GPU architecture `capability` (80, 90, ...)."""
    constexprs, signature, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPE_OF_DTYPE[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    registers, spilled = _assembler_report(ptx, capability)
    return Compiled(
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        tensor_core_instructions=len(re.findall(r"^\s*(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx, re.M)),
    )


def _assembler_report(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, as `ptxas -v` reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        suffix = "a" if capability >= 90 else ""
        report = subprocess.run(
            [get_ptxas(capability).path, "-v", f"-arch=sm_{capability}{suffix}", source, "-o", Path(folder, "cubin")],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = max(int(found) for found in re.findall(r"Used (\d+) registers", report))
    return registers, sum(int(found) for found in re.findall(r"(\d+) bytes spill stores", report))


def main() -> None:
    """Print the table; exit status 1 if a kernel spills or needs more shared memory than the chip has, 2 for misuse."""
    if tile.INTERPRETED.value:
        print("kernels.codegen: interpreted kernels are not compiled; unset TRITON_INTERPRET", file=sys.stderr)
        sys.exit(2)
    print(f"triton {triton.__version__}")
    print(f"{'case':34} {'kernel':32} {'dtype':9}  sm regs spill  shared tensor-core")
    failed = False
    for dtype in (torch.bfloat16, torch.float32):
        for launch in operator_launches(dtype):
            for capability, limit in SHARED_MEMORY_LIMIT.items():
                got = compile_for(launch, capability)
                failed |= got.spilled_bytes > 0 or got.shared_bytes > limit
                print(
                    f"{launch.case:34} {launch.kernel.__name__:32} {str(dtype)[6:]:9} {capability:3} "
                    f"{got.registers:4} {got.spilled_bytes:5} {got.shared_bytes:7} {got.tensor_core_instructions:11}",
                    flush=True,
                )
    sys.exit(failed)


if __name__ == "__main__":
    main()
