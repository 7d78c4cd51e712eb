"""Peak memory of a call, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from tests.support.oracle import DEVICE


def peak_bytes(function: Callable[[], object], device: torch.device = DEVICE) -> int:
    """Return peak bytes of tensors on `device` during a call, beyond those allocated before."""
    if device.type == "cuda":
        _warm_up_matmuls(device)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def _warm_up_matmuls(device: torch.device) -> None:
    """Make cuBLAS allocate its workspaces: 8 MiB and more per thread, autograd's included."""
    a, b = (torch.ones(16, 16, device=device, requires_grad=True) for _ in range(2))
    torch.nn.functional.linear(a, b, torch.ones(16, device=device)).sum().backward()
    torch.nn.functional.linear(a.half(), b.half()).sum().backward()
