import subprocess
import sys

import pytest
import torch

from gptfast import devices

CPU = torch.device("cpu")
FAULTS = """
import ctypes, resource, torch
from gptfast import devices

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of 2 MiB would take few faults

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
returned = faults()
devices.keep_freed_memory()
faults()
print(returned, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library is not glibc")
def test_keep_freed_memory_avoids_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split())
    assert returned > 40_000  # pages of 4 KiB
    assert kept < 100


def test_seed_sets_the_generator_of_the_host():
    devices.seed(CPU, 2**64 - 1)
    first = torch.rand(3)
    assert not torch.equal(torch.rand(3), first)
    devices.seed(CPU, 2**64 - 1)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seed_sets_the_generator_of_a_gpu():
    device = torch.device("cuda")
    devices.seed(device, 5)
    first = torch.rand(3, device=device)
    devices.seed(device, 5)
    assert torch.equal(torch.rand(3, device=device), first)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ],
)
def test_resolve_dtype_auto_follows_the_cpu(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert devices.resolve_dtype("auto", CPU) is dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert devices.resolve_dtype("auto", CPU) is torch.float32


def test_peak_memory_counts_tensors():
    before = devices.peak_memory(CPU)
    held = torch.ones(2**26)
    assert devices.peak_memory(CPU) >= before
    assert devices.peak_memory(CPU) > held.nbytes
    assert devices.peak_memory(torch.device("meta")) is None
