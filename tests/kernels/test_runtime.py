import os

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import runtime, tile


@pytest.fixture
def restored_precision():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("restored_precision")
def test_dot_precision_follows_both_settings_of_pytorch():
    assert runtime.dot_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert runtime.dot_precision(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert runtime.dot_precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert runtime.dot_precision(torch.float32) == "tf32"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A simulated GPU that kernels can be compiled for, and the C compiler on PATH."""
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = tmp_path / "clang"
    compiler.touch(mode=0o755)
    assert runtime.unsupported_reason(torch.device("cuda")) is None
    return compiler


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (12, 0)])
def test_unsupported_reason_names_the_capability_of_an_old_gpu(gpu, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = runtime.unsupported_reason(torch.device("cuda", 0))
    assert ("7.5" in reason and "8.0" in reason) if capability == (7, 5) else reason is None


def test_unsupported_reason_names_a_missing_c_compiler(gpu, monkeypatch):
    gpu.rename(gpu.parent / "gcc")
    assert runtime.unsupported_reason(torch.device("cuda")) is None
    (gpu.parent / "gcc").rename(gpu.parent / "cc")
    assert "no gcc or clang" in runtime.unsupported_reason(torch.device("cuda"))
    monkeypatch.setenv("CC", str(gpu.parent / "cc"))
    assert runtime.unsupported_reason(torch.device("cuda")) is None
    monkeypatch.setenv("CC", os.devnull)
    assert "/dev/null" in runtime.unsupported_reason(torch.device("cuda"))


def test_unsupported_reason_names_a_missing_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in runtime.unsupported_reason(torch.device("cuda"))


def test_interpreter_needs_no_gpu_and_no_compiler(gpu, monkeypatch):
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(True))
    gpu.unlink()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert runtime.unsupported_reason(torch.device("cuda")) is None


def test_next_power_of_2_equals_tritons():
    sizes = [*range(1, 300), 65_535, 65_536, 65_537, 2**31]
    assert [runtime.next_power_of_2(n) for n in sizes] == [triton.next_power_of_2(n) for n in sizes]


def test_plain_inference_skips_the_dispatcher():
    x, parameter = torch.ones(2, 3), torch.nn.Parameter(torch.ones(3))
    assert runtime.can_skip_dispatcher(x, None)
    assert not runtime.can_skip_dispatcher(x, parameter)
    with torch.no_grad():
        assert runtime.can_skip_dispatcher(x, parameter)


def test_transforms_and_modes_need_the_dispatcher():
    x = torch.ones(2, 3)
    assert not runtime.can_skip_dispatcher(x.to("meta"))
    with FakeTensorMode() as mode:
        assert not runtime.can_skip_dispatcher(mode.from_tensor(x))
    assert not runtime.can_skip_dispatcher(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        assert not runtime.can_skip_dispatcher(x)
    skipped = []
    torch.vmap(lambda row: skipped.append(runtime.can_skip_dispatcher(row)) or row)(x)
    torch.func.grad(lambda row: skipped.append(runtime.can_skip_dispatcher(x, row)) or row.sum())(x)
    torch.compile(lambda row: skipped.append(runtime.can_skip_dispatcher(row)) or row, backend="eager")(x)
    assert skipped == [False] * 3
    assert runtime.can_skip_dispatcher(x)
