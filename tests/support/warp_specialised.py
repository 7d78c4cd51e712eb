"""A warp-specialised attention forward for Hopper in Gluon, compiled and never run: see `docs/hopper-attention.md`.

Causal, bfloat16, lengths that are multiples of 128, one [B * H * T, D] matrix each for q, k and v. One warp copies
tiles by tensor descriptors, two groups of four warps multiply, 64 queries each. `python warp_specialised.py` compiles
it for sm_90 without a GPU and prints a line of JSON for each configuration.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

CONFIGURATIONS = ((64, 128, 2), (64, 128, 3), (128, 128, 2), (128, 64, 3))  # head size, keys in a tile, stages


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, q_full, k_full, k_empty, v_full, v_empty, first_row, first_key_row,
    n_blocks, BN: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    for c in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [first_row + c * 64, 0], q_full.index(c), q_buf.index(c))
    for i in range(n_blocks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        row = first_key_row + (n_blocks - 1 - i) * BN
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row, 0], k_full.index(stage), k_buf.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [row, 0], v_full.index(stage), v_buf.index(stage))


@gluon.jit
def consumer(
    c: gl.constexpr, q_buf, k_buf, v_buf, q_full, k_full, k_empty, v_full, v_empty, o_ptr, lse_ptr, first_row,
    first_query, n_blocks, scale_log2, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    s_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    acc = gl.zeros([64, D], gl.float32, o_layout)
    row_max = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))
    queries = first_query + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    mbarrier.wait(q_full.index(c), 0)
    for i in range(n_blocks):
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        zero = gl.zeros([64, BN], gl.float32, s_layout)
        tok = warpgroup_mma(q_buf.index(c), k_buf.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[tok])
        mbarrier.arrive(k_empty.index(stage), count=1)
        s = s * scale_log2
        if i == 0:
            keys = (n_blocks - 1 - i) * BN + gl.arange(0, BN, gl.SliceLayout(0, s_layout))
            s = gl.where(keys[None, :] <= queries[:, None], s, float("-inf"))
        new_max = gl.maximum(row_max, gl.max(s, axis=1))
        p = gl.exp2(s - new_max[:, None])
        shrink = gl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + gl.sum(p, axis=1)
        row_max = new_max
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
        pb = gl.convert_layout(p.to(gl.bfloat16), p_layout)
        mbarrier.wait(v_full.index(stage), phase)
        tok = warpgroup_mma(pb, v_buf.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[tok])
        mbarrier.arrive(v_empty.index(stage), count=1)
    acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, o_layout))[:, None]
    rows = first_row + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, o_layout))
    cols = gl.arange(0, D, gl.SliceLayout(0, o_layout))
    gl.store(o_ptr + rows[:, None] * D + cols[None, :], acc.to(gl.bfloat16))
    lse_rows = first_row + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, s_layout))
    gl.store(lse_ptr + lse_rows, row_max + gl.log2(row_sum))


@gluon.jit
def forward(
    q_desc, k_desc, v_desc, o_ptr, lse_ptr, length, scale_log2, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr
):
    head = gl.program_id(0)
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    first_query = tile * 128
    first_row = head * length + first_query
    n_blocks = (first_query + 128 + BN - 1) // BN
    q_buf = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], q_desc.layout)
    k_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(v_full.index(s), count=1)
        mbarrier.init(k_empty.index(s), count=2)
        mbarrier.init(v_empty.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consumer, (
                0, q_buf, k_buf, v_buf, q_full, k_full, k_empty, v_full, v_empty, o_ptr, lse_ptr, first_row,
                first_query, n_blocks, scale_log2, D, BN, STAGES,
            )),
            (consumer, (
                1, q_buf, k_buf, v_buf, q_full, k_full, k_empty, v_full, v_empty, o_ptr, lse_ptr, first_row,
                first_query, n_blocks, scale_log2, D, BN, STAGES,
            )),
            (producer, (
                q_desc, k_desc, v_desc, q_buf, k_buf, v_buf, q_full, k_full, k_empty, v_full, v_empty, first_row,
                head * length, n_blocks, BN, STAGES, 2,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def compile_forward(head_size: int, keys: int, stages: int):
    def descriptor(rows: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, head_size], gl.bfloat16)
        return f"tensordesc<bf16[{rows}, {head_size}],{layout!r}>"

    signature = {
        "q_desc": descriptor(64),
        "k_desc": descriptor(keys),
        "v_desc": descriptor(keys),
        "o_ptr": "*bf16",
        "lse_ptr": "*fp32",
        "length": "i32",
        "scale_log2": "fp32",
        **dict.fromkeys(("D", "BN", "STAGES"), "constexpr"),
    }
    names = list(signature)
    constants = {(names.index(n),): v for n, v in (("D", head_size), ("BN", keys), ("STAGES", stages))}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("o_ptr", "lse_ptr", "length")}
    source = GluonASTSource(forward, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def describe(head_size: int, keys: int, stages: int) -> dict[str, int]:
    compiled = compile_forward(head_size, keys, stages)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", source, "-o", Path(folder, "cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "head_size": head_size,
        "keys": keys,
        "stages": stages,
        "registers": max(int(found) for found in re.findall(r"Used (\d+) registers", report)),
        "spilled_bytes": sum(int(found) for found in re.findall(r"(\d+) bytes spill stores", report)),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "bulk_copies": ptx.count("cp.async.bulk.tensor"),
        "register_budgets": ptx.count("setmaxnreg.inc"),
    }


if __name__ == "__main__":
    for configuration in CONFIGURATIONS:
        print(json.dumps(describe(*configuration)), flush=True)
