"""What a call costs the host before its launch: checks of the arguments, and the choice of a configuration."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from kernels import attention, checks, ffn, int8, norm, runtime
from kernels.tma import supports_tma
from kernels.tuning import Tunable

CPU = torch.device("cpu")
X, W, B = torch.zeros(8, 64), torch.zeros(64), torch.zeros(64)
INT8, SCALE = torch.zeros(128, 64, dtype=torch.int8), torch.zeros(128)
UP, DOWN, Q = torch.zeros(128, 64), torch.zeros(64, 128), torch.zeros(1, 2, 8, 32)


def choose(tunable: Tunable, *problem: object) -> None:
    tunable.launch(lambda options: runtime.cdiv(1000, options["BM"]), CPU, *problem)


def norm_alone() -> None:
    checks.layer_norm(X, W, B, 1e-5, None)
    choose(norm._FORWARD, 64, torch.float32, False, False)


def norm_with_addition() -> None:
    checks.add_layer_norm(X, X, W, B, 1e-5, 0.1, None, None)
    choose(norm._FORWARD, 64, torch.float32, True, True)


def feed_forward() -> None:
    checks.gelu_ffn(X, UP, None, DOWN, None, "gelu", "fused")
    aligned = supports_tma(X, UP)
    choose(ffn._UP, ffn._rows_key(8), 64, torch.float32, "gelu", False, True, aligned, "fused")


def attend() -> None:
    checks.causal_attention(Q, Q, Q, None, 0.1, None)
    described = supports_tma(Q, Q, Q, Q)
    choose(attention._FORWARD, *attention._key(Q, Q, None, described))


def multiply_int8() -> None:
    checks.int8_linear(X, INT8, SCALE, SCALE)
    choose(int8._ROWS, 64, 16, torch.float32)


@pytest.mark.parametrize("call", [norm_alone, norm_with_addition, feed_forward, attend, multiply_int8])
def test_checks_grid_and_configuration_take_microseconds(call: Callable[[], None]):
    """A few; the limit leaves room for machines that are slow and busy, not for a file that is read or a lost cache."""
    call()
    shortest = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(10):
            call()
        shortest = min(shortest, (time.perf_counter() - start) / 10)
    print(f"{call.__name__}: {shortest * 1e6:.1f} us")
    assert shortest < 30e-6
