"""Ahead-of-time compilation of every kernel for several GPUs, without a GPU.

`python -m kernels.codegen` prints registers, spills, shared memory, occupancy and instruction counts of each kernel in
every configuration that tuning tries, for each target. The operators' launches are recorded on CPU tensors, then
compiled. A ! after the number of matrix instructions marks serialised ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import operators, tile, tuning
from kernels.targets import TARGETS, Compiled, Target

_MAX_CANDIDATES = 4
_COMPILER_OPTIONS = ("num_warps", "num_stages", "maxnreg")

_TYPE_OF_DTYPE = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Launch:
    """A recorded kernel launch: the function, its arguments by name and its compiler options."""

    case: str
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


def record(case: str, function: Callable[..., object], *arguments: object) -> list[Launch]:
    """Call an operator's host function, and record its kernel launches instead of executing them."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: Any) -> None:
        options: dict[str, int] = {name: kwargs.pop(name) for name in _COMPILER_OPTIONS if name in kwargs}
        by_name = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(case, kernel, by_name, options))

    with patch.object(JITFunction, "run", run):
        function(*arguments)
    if not launches:
        raise RuntimeError(f"{case}: no kernel launch was recorded")
    return launches


def operator_launches(dtype: torch.dtype) -> list[Launch]:
    """Record the launches in `dtype` that the operators declare as `codegen_cases`."""
    return [
        launch
        for module in operators.modules()
        for case, function, arguments in module.codegen_cases(dtype)
        for launch in record(case, function, *arguments)
    ]


def compile_for(launch: Launch, target: Target) -> Compiled:
    """Compile a recorded launch, specialised as Triton does: integers by divisibility by 16, and 1 by its value."""
    constexprs, signature, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constexprs[(position,)] = value
        elif isinstance(value, TensorDescriptor):
            dtype = _TYPE_OF_DTYPE[value.base.dtype].removeprefix("*")
            signature[parameter.name] = f"tensordesc<{dtype}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPE_OF_DTYPE[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return target.compile(ASTSource(launch.kernel, signature, constexprs, attributes), launch.options)


def launches_for(target: Target, dtype: torch.dtype) -> list[Launch]:
    """Return every launch on `target` once, with the default configuration first, then with other candidates."""
    launches: dict[str, Launch] = {}
    with tuning.assume_architecture(target.name):
        for index in range(_MAX_CANDIDATES):
            with tuning.candidate(index):
                for launch in operator_launches(dtype):
                    launches.setdefault(f"{launch.case} {launch.kernel.__name__} {_configuration(launch)}", launch)
    return list(launches.values())


def _configuration(launch: Launch) -> dict[str, int]:
    """Block shape and compiler options."""
    names = ("BM", "BN", "BK", "BLOCK", "DESCRIPTORS")
    return {name: launch.arguments[name] for name in names if name in launch.arguments} | launch.options


def results(targets: tuple[Target, ...] = TARGETS) -> Iterator[tuple[Launch, str, Target, Compiled]]:
    """Compile every launch in bfloat16 and float32 for each target."""
    for dtype in (torch.bfloat16, torch.float32):
        for target in targets:
            for launch in launches_for(target, dtype):
                yield launch, str(dtype).removeprefix("torch."), target, compile_for(launch, target)


def _line(launch: Launch, dtype: str, target: Target, result: Compiled) -> str:
    return (
        f"{launch.case:34} {launch.kernel.__name__:36} {_blocks(launch):18} {dtype:9} {target.name:7} "
        f"{result.registers:4} {result.spilled_bytes:5} {result.shared_bytes:6} {result.occupancy:9.0%} "
        f"{result.matrix_instructions:6}{'!' if result.serialised else ' '}{result.bulk_copies:4} "
        f"{result.loads:5} {result.stores:6} {result.wide_share:7.0%}"
    )


def _blocks(launch: Launch) -> str:
    """Return block shape, warps and pipeline stages, such as "128x64x64 w8 s3"."""
    sizes = "x".join(str(launch.arguments[name]) for name in ("BM", "BN", "BK", "BLOCK") if name in launch.arguments)
    stages = f" s{launch.options['num_stages']}" if "num_stages" in launch.options else ""
    return f"{sizes} w{launch.options.get('num_warps', 4)}{stages}"


def _json(launch: Launch, dtype: str, target: Target, result: Compiled) -> str:
    return json.dumps(
        {"case": launch.case, "kernel": launch.kernel.__name__, "dtype": dtype, "target": target.name}
        | _configuration(launch)
        | dataclasses.asdict(result)
    )


def main() -> None:
    """Print the table.

    The exit status is 1 if a kernel spills, exceeds shared memory or has serialised matrix instructions; 2 for misuse.
    """
    names = [target.name for target in TARGETS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=names, help="compile for this GPU architecture only")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each kernel instead of the table")
    options = parser.parse_args()
    if tile.INTERPRETED.value:
        print("kernels.codegen: the interpreter compiles nothing; unset TRITON_INTERPRET", file=sys.stderr)
        sys.exit(2)
    if not options.json:
        print(f"triton {triton.__version__}")
        head = f"{'case':34} {'kernel':36} {'blocks':18} {'dtype':9} {'target':7}"
        print(f"{head} regs spill shared occupancy matrix bulk loads stores 16-byte")
    failed = False
    write = _json if options.json else _line
    for launch, dtype, target, result in results(tuple(t for t in TARGETS if options.target in (None, t.name))):
        failed |= result.spilled_bytes > 0 or result.shared_bytes > target.shared_limit or result.serialised
        print(write(launch, dtype, target, result), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
