"""Kernels compile for GPUs that are not present, and the machine code is as fast as it can be: no GPU is needed."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from benchmarks.cost_model import operators as costs
from kernels import codegen as codegen_module
from kernels import operators
from kernels.targets import TARGETS, Compiled

LIMITS = {target.name: target.shared_limit for target in TARGETS}
TARGET_NAMES = list(LIMITS)
MULTIPLY = ("_ffn", "_attention_forward", "_attention_dk_dv", "_attention_dq", "_int8_tiles")
KEY = ("case", "kernel", "dtype", "BM", "BN", "BK", "BLOCK", "DESCRIPTORS", "num_warps", "num_stages")
OLD_TRITON = version("triton").startswith("3.6.")
UNITS = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma"}
ITEMSIZE = {"bfloat16": 2, "float32": 4}

every_target = pytest.mark.parametrize("target", TARGET_NAMES)


def codegen(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kernels.codegen", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@functools.cache
def compilations() -> dict[str, Future]:
    """All targets, side by side."""
    pool = ThreadPoolExecutor(os.cpu_count())
    return {target: pool.submit(codegen, "--target", target, "--json") for target in TARGET_NAMES}


@functools.cache
def compiled(target: str) -> list[dict]:
    done = compilations()[target].result()
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows, done.stderr
    names = {name for module in operators.modules() for name in vars(module)}
    assert {row["kernel"] for row in rows} == {name for name in names if name.endswith("_kernel")}
    assert {row["dtype"] for row in rows} == set(ITEMSIZE)
    # the exit status agrees with the rows
    assert done.returncode == any(
        row["spilled_bytes"] > 0 or row["shared_bytes"] > LIMITS[target] or row["serialised"] for row in rows
    ), done.stderr
    return rows


@pytest.mark.slow
@every_target
def test_every_kernel_fits_its_target(target):
    """Registers hold everything, but for heads of 256 on two targets; Triton 3.6 is a few bytes short on one."""
    rows = compiled(target)
    assert max(row.get("num_warps", 4) for row in rows) * (64 if target.startswith("gfx") else 32) <= 1024
    assert [row for row in rows if row["shared_bytes"] > LIMITS[target]] == []
    assert [row for row in rows if row["serialised"] or row["transposed_results"]] == []
    attention = [row for row in rows if row["case"].startswith("causal_attention")]
    for row in rows:
        if target not in ("sm_100", "gfx942") or row not in attention:
            assert row["spilled_bytes"] == 0, row
        elif "D=256" not in row["case"]:
            assert row["spilled_bytes"] <= (28 if target == "sm_100" and OLD_TRITON else 0), row


@pytest.mark.slow
@every_target
def test_matmuls_use_matrix_instructions(target):
    for row in compiled(target):
        multiplies = row["kernel"].startswith(MULTIPLY)
        if row["dtype"] == "bfloat16" or not multiplies:
            assert (row["matrix_instructions"] > 0) is multiplies, row


@pytest.mark.slow
@every_target
def test_norms_have_programs_enough_to_keep_memory_busy(target):
    assert min(row["occupancy"] for row in compiled(target) if row["kernel"].startswith("_layer_norm")) >= 0.12


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
def test_serialised_products_are_reported(between: str):
    ptx = PRODUCTS.format(between=between)
    (target,) = (target for target in TARGETS if target.name == "sm_90")
    _, _, serialised, accesses = target.read(SimpleNamespace(asm={"ptx": ptx}), target)
    assert serialised is bool(between)
    assert ("store", 4) in accesses


def test_codegen_marks_a_serialised_product_and_fails(monkeypatch, capsys):
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
@every_target
def test_ffn_uses_the_best_instructions_of_its_target(target):
    rows = [row for row in compiled(target) if row["kernel"].startswith("_ffn") and row["dtype"] == "bfloat16"]
    assert {row["matrix_units"] for row in rows} == {UNITS[target]}
    # TMA copies every tile: two operands, and what the epilogue reads and writes
    with_tma = {row["kernel"] for row in rows if row["DESCRIPTORS"]}
    assert with_tma == (set() if target in ("sm_80", "sm_89", "gfx942") else {row["kernel"] for row in rows})
    for row in rows:
        assert (row["bulk_copies"] >= 4) is row["DESCRIPTORS"], row


@pytest.mark.slow
@every_target
def test_attention_uses_the_best_instructions_of_its_target(target):
    rows = [row for row in compiled(target) if row["case"].startswith("causal_attention")]
    expected = {"_attention_forward_kernel", "_attention_dk_dv_kernel", "_attention_dq_kernel"}
    if target == "sm_120":
        expected = {"_attention_forward_kernel"}
    with_tma = [row for row in rows if row.get("DESCRIPTORS")]
    assert {row["kernel"] for row in with_tma} == (expected if target in ("sm_90", "sm_100", "sm_120") else set())
    assert {row["matrix_units"] for row in with_tma} <= {UNITS[target]}
    for row in rows:
        assert (row["bulk_copies"] >= 4) is bool(row.get("DESCRIPTORS")), row


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_120"])
def test_dropout_moves_no_mask_between_threads(target):
    """With dropout and without, the same blocks take the same shared memory."""
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
@every_target
def test_decoding_reads_the_cache_in_wide_accesses(target):
    for row in compiled(target):
        if row["kernel"] == "_decode_part_kernel":  # the query and the result are a number per thread
            assert row["wide_share"] >= 0.75, row


@pytest.mark.slow
@every_target
def test_int8_weights_are_read_once_in_wide_accesses(target):
    rows = [row for row in compiled(target) if row["kernel"].startswith("_int8")]
    for row in rows:
        columns, inner, itemsize = row["BN"], row["BK"], ITEMSIZE[row["dtype"]]
        x = row.get("BM", 1) * inner * itemsize
        # a tile of weights and of x, scales and biases
        assert row["loaded_bytes"] == columns * inner + x + columns * (4 + itemsize), row
        assert row["stored_bytes"] == row.get("BM", 1) * columns * itemsize, row
        # scales and biases are a number per thread, as are results with rows of odd length; AMD has twice the threads
        assert row["wide_share"] >= (0.4 if "N=50257" in row["case"] else 0.7) or target == "gfx942", row
    # the largest matrix has enough bytes in flight to cover the latency of memory
    if target == "sm_90":
        for row in rows:
            if "N=50257" in row["case"] and row["kernel"] == "_int8_sums_kernel":
                programs = int(row["occupancy"] * 64) // row["num_warps"]
                assert programs * row["BN"] * 768 >= 26_000, row


@pytest.mark.slow
@every_target
def test_loss_reads_logits_in_wide_accesses(target):
    """For any number of classes: 50,257 is odd."""
    rows = [row for row in compiled(target) if row["kernel"] == "_cross_entropy_kernel"]
    assert min(row["occupancy"] for row in rows) >= 0.5
    # the target and its logit are a number per thread; threads have two to eight logits
    assert [row for row in rows if row["wide_share"] < 0.5 and row["target"] != "gfx942"] == []
    variants = {row["case"].removeprefix("linear_cross_entropy ") for row in rows}
    assert variants == {
        f"V={classes}{smoothed}{inference}"
        for classes, smoothed, inference in itertools.product((128, 50_257), ("", " smoothed"), ("", " inference"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ITEMSIZE)
def test_loss_reads_logits_twice_and_writes_them_once(dtype):
    """Each loop's code counts once: a block is read for the sums, read again for the gradient, and written.

    Blocks without padding and blocks with padding have their own loops. An ignored row is only written.
    """
    case, itemsize = ("linear_cross_entropy V=50257", dtype), ITEMSIZE[dtype]
    rows = [row for row in compiled("sm_90") if (row["case"], row["dtype"]) == case]
    assert len(rows) == 3
    for row in rows:
        block = row["BLOCK"] * itemsize
        assert row["loaded_bytes"] == 2 * 2 * block + 8 + itemsize  # the target, and its logit
        assert row["stored_bytes"] == 2 * (block + 4) + block + itemsize  # losses; the target's gradient


@pytest.mark.slow
@every_target
def test_norms_access_16_bytes_at_a_time(target):
    """Where a thread has that many, except statistics and partial sums, which are a number per thread."""
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
def test_norms_move_the_bytes_of_the_closed_form(operator, dtype):
    """Loads and stores of one whole row. The weight, and the float32 sums for weight and bias, count once."""
    width = 4096
    case = (f"{operator} C={width}", dtype, 1)
    rows = {row["kernel"]: row for row in compiled("sm_90") if (row["case"], row["dtype"], row.get("BM")) == case}
    forward, backward = rows["_layer_norm_forward_kernel"], rows["_layer_norm_backward_kernel"]
    assert forward["BN"] == backward["BN"] == width
    expected = getattr(costs, operator)(1, width, ITEMSIZE[dtype])
    assert forward["loaded_bytes"] + forward["stored_bytes"] == expected.forward.bytes
    in_float32 = 2 * width * (4 - ITEMSIZE[dtype])
    assert backward["loaded_bytes"] + backward["stored_bytes"] == expected.backward.bytes + in_float32


@pytest.mark.slow
@every_target
def test_every_candidate_of_tuning_is_compiled_once(target):
    rows = compiled(target)
    keys = [json.dumps({n: row.get(n) for n in KEY}) for row in rows]
    assert len(set(keys)) == len(keys)
    norms = [row for row in rows if row["case"] == "layer_norm C=768" and row["dtype"] == "bfloat16"]
    assert len([row for row in norms if row["kernel"] == "_layer_norm_forward_kernel"]) == 4


def test_codegen_rejects_the_interpreter():
    done = codegen(TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unset TRITON_INTERPRET" in done.stderr


def test_recording_no_launch_is_an_error():
    with pytest.raises(RuntimeError, match="nothing"):
        codegen_module.record("nothing", lambda: None)
