"""Kernels compile for GPUs that are not here: what the interpreter cannot show."""

import os
import subprocess
import sys

import pytest

from kernels import codegen


@pytest.mark.slow
def test_every_kernel_compiles_without_spills_and_with_tensor_cores():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "kernels.codegen"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    compiled = {(row[-7], row[-6], row[-5]): row for row in rows}
    kernels = {kernel for kernel, _, _ in compiled}
    assert {dtype for _, dtype, _ in compiled} == {"bfloat16", "float32"}
    assert {chip for _, _, chip in compiled} == {"80", "89", "90", "120"}
    assert len(kernels) == 8
    for row in rows:
        multiplies = not row[-7].startswith(("_layer_norm", "_attention_delta"))
        assert (int(row[-1]) > 0) is (multiplies and row[-6] == "bfloat16"), " ".join(row)


def test_interpreted_kernels_are_refused_in_one_line():
    command = [sys.executable, "-m", "kernels.codegen"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kernels.codegen: interpreted kernels are not compiled; unset TRITON_INTERPRET\n"


def test_a_table_cannot_be_empty():
    with pytest.raises(RuntimeError, match="nothing: no launch of a kernel was recorded"):
        codegen.record("nothing", lambda: None)
