"""Kernels compile for GPUs that are not here: what the interpreter cannot show."""

import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cost_model import operators
from kernels import codegen as codegen_module
from kernels.targets import TARGETS as KERNEL_TARGETS
from kernels.targets import Compiled

TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"]
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
KERNELS = {
    "_layer_norm_forward_kernel",
    "_layer_norm_forward_chunked_kernel",
    "_layer_norm_backward_kernel",
    "_layer_norm_backward_chunked_kernel",
    "_layer_norm_parameters_kernel",
    "_ffn_up_kernel",
    "_ffn_down_backward_kernel",
    "_activation_kernel",
    "_activation_backward_kernel",
    "_attention_forward_kernel",
    "_attention_delta_kernel",
    "_attention_dk_dv_kernel",
    "_attention_dq_kernel",
    "_decode_part_kernel",
    "_decode_merge_kernel",
    "_cross_entropy_kernel",
    "_int8_sums_kernel",
    "_int8_tiles_kernel",
}
MULTIPLY = ("_ffn", "_attention_forward", "_attention_dk_dv", "_attention_dq", "_int8_tiles")
KEY = ("case", "kernel", "dtype", "BM", "BN", "BK", "BLOCK", "DESCRIPTORS", "num_warps", "num_stages")
OLD_TRITON = version("triton").startswith("3.6.")
UNITS = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma"}
ITEMSIZE = {"bfloat16": 2, "float32": 4}


def codegen(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kernels.codegen", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@functools.cache
def compilations() -> dict[str, Future]:
    """All targets, side by side."""
    pool = ThreadPoolExecutor(os.cpu_count())
    return {target: pool.submit(codegen, "--target", target, "--json") for target in TARGETS}


@functools.cache
def compiled(target: str) -> list[dict]:
    done = compilations()[target].result()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["dtype"] for row in rows} == set(ITEMSIZE)
    # the exit status says what the rows say
    assert done.returncode == any(
        row["spilled_bytes"] > 0 or row["shared_bytes"] > SHARED_LIMIT[target] or row["serialised"] for row in rows
    ), done.stderr
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_norms_keep_everything_in_registers(target):
    norms = [row for row in compiled(target) if row["kernel"].startswith("_layer_norm")]
    assert [row for row in norms if row["spilled_bytes"] > 0] == []
    assert all(row["shared_bytes"] <= SHARED_LIMIT[target] for row in norms)
    # enough programs at once to keep memory busy
    assert min(row["occupancy"] for row in norms) >= 0.12


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_nothing_spills_where_the_blocks_were_chosen(target):
    assert [row for row in compiled(target) if row["spilled_bytes"] > 0] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_products_are_the_matrix_units_work(target):
    for row in compiled(target):
        multiplies = row["kernel"].startswith(MULTIPLY)
        if row["dtype"] == "bfloat16" or not multiplies:
            assert (row["matrix_instructions"] > 0) is multiplies, row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_no_program_has_more_threads_than_chips_run(target):
    width = 64 if target.startswith("gfx") else 32
    assert max(row.get("num_warps", 4) for row in compiled(target)) * width <= 1024


@pytest.mark.slow
def test_no_product_is_serialised():
    """On the only chip whose products the compiler serialises, and does so silently."""
    rows = compiled("sm_90")
    assert len([row for row in rows if row["matrix_units"] == "wgmma"]) > 50
    assert [row for row in rows if row["serialised"]] == []


# the second product adds to the first, in registers that are to be left alone between the two
PRODUCTS = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry products(.param .u64 out, .param .u64 tile) {{
  .reg .f32 %f<4>;
  .reg .b64 %d<2>;
  .reg .u32 %thread;
  .reg .pred %some;
  ld.param.u64 %d0, [out];
  ld.param.u64 %d1, [tile];
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f0, %f1, %f2, %f3}}, %d1, %d1, 0, 1, 1, 0, 0;
  {between}
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f0, %f1, %f2, %f3}}, %d1, %d1, 1, 1, 1, 0, 0;
END:
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.global.f32 [%d0], %f0;
  ret;
}}
"""


SERIALISED_BY = {
    "nothing": "",
    "a sum that is written": "ld.global.f32 %f0, [%d0];",
    "a branch": "mov.u32 %thread, %tid.x; setp.gt.u32 %some, %thread, 512; @%some bra END;",
}


@pytest.mark.parametrize("between", SERIALISED_BY.values(), ids=SERIALISED_BY)
def test_what_the_assembler_serialises_is_told(between: str):
    ptx = PRODUCTS.format(between=between)
    (target,) = (target for target in KERNEL_TARGETS if target.name == "sm_90")
    _, _, serialised, accesses = target.read(SimpleNamespace(asm={"ptx": ptx}), target)
    assert serialised is bool(between)
    assert ("store", 4) in accesses


def test_a_serialised_product_is_marked_and_is_an_error(monkeypatch, capsys):
    fields = {field.name: 0 for field in dataclasses.fields(Compiled)} | {"matrix_instructions": 24}
    launch = codegen_module.Launch("case", SimpleNamespace(__name__="kernel"), {}, {})

    def printed(serialised: bool, *arguments: str) -> str:
        got = Compiled(**fields | {"serialised": serialised})
        monkeypatch.setattr(codegen_module, "results", lambda targets: [(launch, "bfloat16", targets[0], got)])
        monkeypatch.setattr(codegen_module.tile, "INTERPRETED", SimpleNamespace(value=False))
        monkeypatch.setattr(sys, "argv", ["codegen", "--target", "sm_90", *arguments])
        with pytest.raises(SystemExit) as exit_status:
            codegen_module.main()
        assert exit_status.value.code is serialised
        return capsys.readouterr().out.splitlines()[-1]

    assert " 24!" in printed(True)
    assert " 24 " in printed(False)
    assert json.loads(printed(True, "--json"))["serialised"] is True


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_feed_forward_fits_every_chip_and_takes_its_best_instructions(target):
    rows = [row for row in compiled(target) if row["case"].startswith("gelu_ffn")]
    assert [row for row in rows if row["spilled_bytes"] > 0] == []
    assert all(row["shared_bytes"] <= SHARED_LIMIT[target] for row in rows)
    fused = [row for row in rows if row["kernel"].startswith("_ffn") and row["dtype"] == "bfloat16"]
    assert {row["matrix_units"] for row in fused} == {UNITS[target]}
    # with descriptors every tile is copied whole: two operands, and what is read and written in the epilogue
    described = {row["kernel"] for row in fused if row["DESCRIPTORS"]}
    assert described == (set() if target in ("sm_80", "sm_89", "gfx942") else {row["kernel"] for row in fused})
    for row in fused:
        assert (row["bulk_copies"] >= 4) is row["DESCRIPTORS"], row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_attention_fits_every_chip(target):
    """Heads of 256 are too wide for the registers of two chips; Triton 3.6 is a few bytes short on one of them."""
    rows = [row for row in compiled(target) if row["case"].startswith("causal_attention")]
    assert all(row["shared_bytes"] <= SHARED_LIMIT[target] for row in rows)
    wide = [row for row in rows if "D=256" in row["case"]]
    spilling = [row for row in rows if row["spilled_bytes"] > (28 if target == "sm_100" and OLD_TRITON else 0)]
    assert [row for row in spilling if row not in wide or target not in ("sm_100", "gfx942")] == []
    described = {row["kernel"] for row in rows if row.get("DESCRIPTORS")}
    expected = {"_attention_forward_kernel", "_attention_dk_dv_kernel", "_attention_dq_kernel"}
    if target == "sm_120":
        expected = {"_attention_forward_kernel"}
    assert described == (expected if target in ("sm_90", "sm_100", "sm_120") else set())
    for row in rows:
        assert (row["bulk_copies"] >= 4) is bool(row.get("DESCRIPTORS")), row
    assert {row["matrix_units"] for row in rows if row.get("DESCRIPTORS")} <= {UNITS[target]}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_random_numbers_are_drawn_where_they_are_used(target):
    """With dropout and without, the same blocks take the same shared memory: no mask is moved between threads."""
    shared = {}
    for row in compiled(target):
        if row["case"].startswith("causal_attention") and row["dtype"] == "bfloat16":
            case = row["case"].removesuffix(" dropout")
            key = json.dumps([case, row["kernel"], *(row.get(name) for name in KEY[3:])])
            shared.setdefault(key, {})[row["case"] != case] = row["shared_bytes"]
    both = [by_dropout for by_dropout in shared.values() if len(by_dropout) == 2]
    assert len(both) >= 12
    assert [by_dropout for by_dropout in both if by_dropout[True] != by_dropout[False]] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_decoding_reads_the_cache_in_wide_pieces(target):
    rows = [row for row in compiled(target) if row["case"].startswith("decode_attention")]
    assert [row for row in rows if row["spilled_bytes"] > 0] == []
    parts = [row for row in rows if row["kernel"] == "_decode_part_kernel"]
    for row in parts:  # the rest is the query and the result, a number to a thread
        assert row["wide_share"] >= 0.75, row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_int8_weights_are_read_once_in_wide_pieces(target):
    rows = [row for row in compiled(target) if row["kernel"].startswith("_int8")]
    assert [row for row in rows if row["spilled_bytes"] > 0 or row["shared_bytes"] > SHARED_LIMIT[target]] == []
    for row in rows:
        columns, inner, itemsize = row["BN"], row["BK"], ITEMSIZE[row["dtype"]]
        x = row.get("BM", 1) * inner * itemsize
        # a tile of weights and of x, scales and biases
        assert row["loaded_bytes"] == columns * inner + x + columns * (4 + itemsize), row
        assert row["stored_bytes"] == row.get("BM", 1) * columns * itemsize, row
        # the rest are scales and biases, a number to a thread, as are results where their rows are of odd length;
        # AMD's threads are twice as many, and have less each
        assert row["wide_share"] >= (0.4 if "N=50257" in row["case"] else 0.7) or target == "gfx942", row
    # of the largest matrix at least as much is on its way as memory's latency asks for
    if target == "sm_90":
        for row in rows:
            if "N=50257" in row["case"] and row["kernel"] == "_int8_sums_kernel":
                programs = int(row["occupancy"] * 64) // row["num_warps"]
                assert programs * row["BN"] * 768 >= 26_000, row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_loss_reads_logits_in_wide_pieces(target):
    """Whatever the number of classes: 50,257 is odd."""
    rows = [row for row in compiled(target) if row["kernel"] == "_cross_entropy_kernel"]
    assert [row for row in rows if row["spilled_bytes"] > 0] == []
    assert min(row["occupancy"] for row in rows) >= 0.5
    # the rest is the target and its logit, a number to a thread; the widest threads have two to eight logits
    assert [row for row in rows if row["wide_share"] < 0.5 and row["target"] != "gfx942"] == []
    variants = {row["case"].removeprefix("linear_cross_entropy ") for row in rows}
    assert variants == {
        f"V={classes}{smoothed}{inference}"
        for classes, smoothed, inference in itertools.product((128, 50_257), ("", " smoothed"), ("", " inference"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_the_loss_reads_logits_twice_and_writes_them_once(dtype):
    """Code of the loops, each counted once: a block read for the sums, read again for the gradient, and written.

    All of that for blocks of classes alone, and for those with padding. A row that is ignored is written alone.
    """
    case, itemsize = ("linear_cross_entropy V=50257", dtype), ITEMSIZE[dtype]
    rows = [row for row in compiled("sm_90") if (row["case"], row["dtype"]) == case]
    assert len(rows) == 3
    for row in rows:
        block = row["BLOCK"] * itemsize
        assert row["loaded_bytes"] == 2 * 2 * block + 8 + itemsize  # the target, and its logit
        assert row["stored_bytes"] == 2 * (block + 4) + block + itemsize  # losses; the target's gradient


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_rows_are_read_and_written_16_bytes_at_a_time(target):
    """Where a thread has as many: all but statistics and partial sums, whose every thread writes a word of its own."""
    checked = 0
    for row in compiled(target):
        if row["kernel"].startswith("_layer_norm") and row["kernel"] != "_layer_norm_parameters_kernel":
            threads = row["num_warps"] * (64 if target == "gfx942" else 32)
            if row["BM"] * row["BN"] * ITEMSIZE[row["dtype"]] >= 16 * threads:
                assert row["wide_share"] >= 0.55, row
                checked += 1
    assert checked >= 100


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ITEMSIZE)
@pytest.mark.parametrize("operator", ["layer_norm", "add_layer_norm"])
def test_norms_move_no_more_bytes_than_they_must(operator, dtype):
    """Loads and stores of the code itself, for one whole row of a program, against the closed form.

    The forward is straight code. The backward's loop is counted once, as is what stands around it: the weight, read
    once, and the sums for weight and bias, written in float32.
    """
    width = 4096
    case = (f"{operator} C={width}", dtype, 1)
    rows = {row["kernel"]: row for row in compiled("sm_90") if (row["case"], row["dtype"], row.get("BM")) == case}
    forward, backward = rows["_layer_norm_forward_kernel"], rows["_layer_norm_backward_kernel"]
    assert forward["BN"] == backward["BN"] == width
    expected = getattr(operators, operator)(1, width, ITEMSIZE[dtype])
    assert forward["loaded_bytes"] + forward["stored_bytes"] == expected.forward.bytes
    in_float32 = 2 * width * (4 - ITEMSIZE[dtype])
    assert backward["loaded_bytes"] + backward["stored_bytes"] == expected.backward.bytes + in_float32


@pytest.mark.slow
def test_every_candidate_of_tuning_is_compiled():
    """Each width of a norm in more than one configuration; none twice."""
    for target in TARGETS:
        rows = compiled(target)
        keys = [json.dumps({n: row.get(n) for n in KEY}) for row in rows]
        assert len(set(keys)) == len(keys)
        norms = [row for row in rows if row["case"] == "layer_norm C=768" and row["dtype"] == "bfloat16"]
        assert len([row for row in norms if row["kernel"] == "_layer_norm_forward_kernel"]) == 4


def test_an_interpreted_compilation_is_refused():
    done = codegen(TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kernels.codegen: interpreted kernels are not compiled; unset TRITON_INTERPRET\n"


def test_a_table_cannot_be_empty():
    with pytest.raises(RuntimeError, match="nothing: no launch of a kernel was recorded"):
        codegen_module.record("nothing", lambda: None)


def test_no_product_takes_the_transpose_of_what_a_product_gave():
    """Triton before 3.7.1 miscompiles `tl.dot(tl.trans(x), y)` for Hopper where x comes from an earlier product."""
    folder = Path(codegen_module.__file__).parent
    transposed = {
        name for path in folder.glob("*.py") for name in re.findall(r"tl\.trans\((.+?)\)", path.read_text("utf-8"))
    }
    # tiles as they were loaded
    assert transposed == {"k", "b_k", "b_q", "b_v", "b_do", "b.load([col, start]"}
