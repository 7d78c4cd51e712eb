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
def test_float32_products_follow_both_settings_of_pytorch():
    assert runtime.dot_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert runtime.dot_precision(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert runtime.dot_precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert runtime.dot_precision(torch.float32) == "tf32"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that kernels can be compiled for, as far as PyTorch and PATH tell."""
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
def test_a_gpu_that_is_too_old_is_named(gpu, monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = "the GPU has compute capability 7.5, at least 8.0 is needed" if capability == (7, 5) else None
    assert runtime.unsupported_reason(torch.device("cuda", 0)) == reason


def test_compiling_needs_a_c_compiler_where_triton_looks_for_it(gpu, monkeypatch):
    gpu.rename(gpu.parent / "gcc")
    assert runtime.unsupported_reason(torch.device("cuda")) is None
    (gpu.parent / "gcc").rename(gpu.parent / "cc")
    assert runtime.unsupported_reason(torch.device("cuda")) == (
        "Triton needs a C compiler and found no gcc or clang; the variable CC can name one"
    )
    monkeypatch.setenv("CC", str(gpu.parent / "cc"))
    assert runtime.unsupported_reason(torch.device("cuda")) is None
    monkeypatch.setenv("CC", os.devnull)
    assert "found no /dev/null" in runtime.unsupported_reason(torch.device("cuda"))


def test_compiling_needs_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.unsupported_reason(torch.device("cuda")) == "no CUDA device was found"


def test_interpreting_needs_neither(gpu, monkeypatch):
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(True))
    gpu.unlink()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert runtime.unsupported_reason(torch.device("cuda")) is None


def test_powers_of_two_are_those_of_triton():
    sizes = [*range(1, 300), 65_535, 65_536, 65_537, 2**31]
    assert [runtime.next_power_of_2(n) for n in sizes] == [triton.next_power_of_2(n) for n in sizes]


def test_plain_inference_goes_past_the_dispatcher():
    x, parameter = torch.ones(2, 3), torch.nn.Parameter(torch.ones(3))
    assert runtime.can_skip_dispatcher(x, None)
    assert not runtime.can_skip_dispatcher(x, parameter)
    with torch.no_grad():
        assert runtime.can_skip_dispatcher(x, parameter)


def test_what_observes_an_operator_finds_it():
    x = torch.ones(2, 3)
    assert not runtime.can_skip_dispatcher(x.to("meta"))
    with FakeTensorMode() as mode:
        assert not runtime.can_skip_dispatcher(mode.from_tensor(x))
    assert not runtime.can_skip_dispatcher(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        assert not runtime.can_skip_dispatcher(x)
    seen = []
    torch.vmap(lambda row: seen.append(runtime.can_skip_dispatcher(row)) or row)(x)
    torch.func.grad(lambda row: seen.append(runtime.can_skip_dispatcher(x, row)) or row.sum())(x)
    torch.compile(lambda row: seen.append(runtime.can_skip_dispatcher(row)) or row, backend="eager")(x)
    assert seen == [False] * 3
    assert runtime.can_skip_dispatcher(x)
