"""Targets of ahead-of-time compilation, and the resources and instructions of the compiled code."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Compiled:
    """Resources of one program, and counts of the instructions that decide its speed."""

    registers: int  # per thread
    spilled_bytes: int  # per thread
    shared_bytes: int  # per program
    occupancy: float  # share of a multiprocessor's warps that run concurrently
    matrix_instructions: int
    matrix_units: str  # kinds of these instructions, such as "wgmma"
    serialised: bool  # ptxas makes each wgmma wait for the one before
    transposed_results: int  # transposes of computed tiles, whose matmuls Triton before 3.7.1 miscompiles for Hopper
    bulk_copies: int  # TMA copies of whole tiles
    loads: int  # of global memory, including copies to shared memory
    stores: int  # to global memory
    wide_share: float  # share of loaded and stored bytes in accesses of 16 bytes
    loaded_bytes: int  # by one program; each statement counts once
    stored_bytes: int


@dataclass(frozen=True)
class Target:
    """A GPU architecture and the limits of one of its multiprocessors.

    NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". AMD: CDNA 3 instruction set
    architecture reference guide.
    """

    name: str
    gpu: GPUTarget
    shared_limit: int  # bytes for one program
    registers: int  # 32-bit registers, one for each thread
    warps: int
    programs: int
    read: Callable[[Any, Target], tuple[int, int, bool, list[tuple[str, int]]]]  # as _read_nvidia
    reserved_shared: int = 1024  # bytes that the system takes of every program

    def occupancy(self, warps: int, registers: int, shared: int) -> float:
        """Return the share of a multiprocessor's warps that programs of `warps` fill."""
        width = self.gpu.warp_size
        per_warp = -(-registers * width // 256) * 256  # allocated in units of 256
        fitting = min(
            self.programs,
            self.warps // warps,
            self.registers // max(per_warp * warps, 1),
            # one program may use all but the reserved bytes
            (self.shared_limit + self.reserved_shared) // (shared + self.reserved_shared) if shared else self.programs,
        )
        return fitting * warps / self.warps

    def compile(self, source: ASTSource, options: dict[str, int]) -> Compiled:
        """Compile for this target."""
        compiled = triton.compile(source, target=self.gpu, options=options)
        registers, spilled, serialised, accesses = self.read(compiled, self)
        shared = compiled.metadata.shared
        moved = sum(size for _, size in accesses)
        loaded, stored = _program_bytes(compiled.asm["ttir"])
        assembly = compiled.asm["ptx" if self.gpu.backend == "cuda" else "amdgcn"]
        matrix = {unit: len(re.findall(rf"\b{name}", assembly)) for unit, name in _MATRIX_INSTRUCTIONS.items()}
        return Compiled(
            registers=registers,
            spilled_bytes=spilled,
            shared_bytes=shared,
            occupancy=self.occupancy(compiled.metadata.num_warps, registers, shared),
            matrix_instructions=sum(matrix.values()),
            matrix_units="+".join(unit for unit, count in matrix.items() if count > 0),
            serialised=serialised,
            transposed_results=_transposed_results(compiled.asm["ttir"]),
            bulk_copies=len(re.findall(r"\bcp\.async\.bulk\.tensor", assembly)),
            loads=sum(kind == "load" for kind, _ in accesses),
            stores=sum(kind == "store" for kind, _ in accesses),
            wide_share=sum(size for _, size in accesses if size == 16) / moved if moved else 1.0,
            loaded_bytes=loaded,
            stored_bytes=stored,
        )


_MATRIX_INSTRUCTIONS = {
    "mma": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mfma": "v_mfma",
}
_BITS = {"bf16": 16, "f16": 16, "f32": 32, "i64": 64, "i32": 32, "i8": 8}


def _program_bytes(ttir: str) -> tuple[int, int]:
    """Return the bytes that a program loads and stores. Loop bodies count once, and masks do not count."""
    total = {"load": 0, "store": 0}
    for kind, shape, dtype in re.findall(r"tt\.(load|store) .*: (?:tensor<([\dx]*)x)?!tt\.ptr<(\w+)>", ttir):
        total[kind] += math.prod(map(int, shape.split("x") if shape else [])) * _BITS[dtype] // 8
    return total["load"], total["store"]


def _transposed_results(ttir: str) -> int:
    """Count the transposes of matrices that were computed, not loaded."""
    operation: dict[str, str] = {}  # by the latest value of each name: regions reuse names
    count = 0
    for result, name, operand, rest in re.findall(r"%(\S+) = ([\w.]+)(?: %(\S+))?(.*)", ttir):
        if name == "tt.trans" and "i32: 1, 0>" in rest:
            count += operation.get(operand) not in ("tt.load", "tt.descriptor_load", "tt.reshape")
        operation[result] = name
    return count


def _read_nvidia(compiled: Any, target: Target) -> tuple[int, int, bool, list[tuple[str, int]]]:
    """Return registers, spilled bytes, if wgmma is serialised, and the accesses: load or store, and bytes."""
    ptx = compiled.asm["ptx"]
    capability = target.gpu.arch
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        # matrix instructions of the data-centre GPUs are specific to one architecture
        arch = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"-arch={arch}", source, "-o", Path(folder, "cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(found) for found in re.findall(r"Used (\d+) registers", report))
    spilled = sum(int(found) for found in re.findall(r"(\d+) bytes spill stores", report))
    # the text of every cause: C7514 where accumulators are read too early, C7515, C7520
    serialised = "wgmma.mma_async instructions are serialized" in report
    accesses = []
    for kind, suffixes in re.findall(r"\b(ld|st)\.global((?:\.[\w:]+)+)", ptx):
        vector = re.search(r"\.v(\d)", suffixes)
        bits = re.search(r"\.[bfsu](\d+)$", suffixes)
        size = (int(vector[1]) if vector else 1) * (int(bits[1]) // 8 if bits else 4)
        accesses.append(("load" if kind == "ld" else "store", size))
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x[0-9a-f]+)", ptx):
        accesses.append(("load", int(size, 16)))
    return registers, spilled, serialised, accesses


_AMD_SIZES = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "short": 2, "byte": 1}


def _read_amd(compiled: Any, target: Target) -> tuple[int, int, bool, list[tuple[str, int]]]:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return max((int(found) for found in re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    accesses = []
    # "dwordx4" starts with "dword": the longest name first
    sizes = "|".join(sorted(_AMD_SIZES, key=len, reverse=True))
    for kind, size in re.findall(rf"(?:global|buffer)_(load|store)_\w*?({sizes})", assembly):
        accesses.append((kind, _AMD_SIZES[size]))
    # spilled scalar registers go into lanes of vector registers, not to memory
    return field("vgpr_count"), 4 * field("vgpr_spill_count"), False, accesses


_nvidia = partial(Target, read=_read_nvidia, registers=65_536)

TARGETS = (
    _nvidia("sm_80", GPUTarget("cuda", 80, 32), shared_limit=166_912, warps=64, programs=32),
    _nvidia("sm_89", GPUTarget("cuda", 89, 32), shared_limit=101_376, warps=48, programs=24),
    _nvidia("sm_90", GPUTarget("cuda", 90, 32), shared_limit=232_448, warps=64, programs=32),
    _nvidia("sm_100", GPUTarget("cuda", 100, 32), shared_limit=232_448, warps=64, programs=32),
    _nvidia("sm_120", GPUTarget("cuda", 120, 32), shared_limit=101_376, warps=48, programs=24),
    Target(
        "gfx942", GPUTarget("hip", "gfx942", 64), shared_limit=65_536, warps=32, programs=32, read=_read_amd,
        registers=4 * 512 * 64,  # four SIMD units with 512 registers for each of 64 lanes
        reserved_shared=0,
    ),
)  # fmt: skip
