"""Private names of PyTorch, each under a public one.

PyTorch may change or remove these names in any release. `tests/kernels/test_pytorch_internals.py` tests the behaviour
of each, so that such a release fails there and not in training. Functions are bound on import: a call costs what
PyTorch's own costs. NOTE: `GPT._apply`, an override of a private method, stays in its class.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils._python_dispatch
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef


def _bind(path: str) -> Any:
    """Return the function torch.`path`, or one that raises when called where this PyTorch has none."""
    try:
        return functools.reduce(getattr, path.split("."), torch)
    except AttributeError:

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"PyTorch {torch.__version__} has no torch.{path}; install a version that gptfast names")

        return missing


current_dispatch_mode = _bind("utils._python_dispatch._get_current_dispatch_mode")
"""`() -> mode or None`: the innermost active `TorchDispatchMode`."""

current_functorch_level = _bind("_C._functorch.maybe_current_level")
"""`() -> int or None`: the nesting depth of `torch.func` transforms."""

addmm_activation = _bind("_addmm_activation")
"""`(bias [N], x [M, K], w [K, N], use_gelu) -> [M, N]`: GELU or ReLU of x @ w + bias, by cuBLASLt on GPUs.

GELU is the tanh approximation on GPUs and the erf form on CPUs.
"""

softmax_backward = _bind("_softmax_backward_data")
"""`(dp, p, dim, dtype) -> ds`: gradient of the scores whose softmax over `dim` is p."""

int8pack_mm = _bind("_weight_int8pack_mm")
"""`(x [M, K], weight [N, K] int8, scale [N]) -> [M, N]`: x @ weight.T * scale, all but the weight in bfloat16.

NOTE: on CPUs it reads whole vectors, past the end of rows whose length is not a multiple of 64.
"""

onednn_supports_bfloat16 = _bind("ops.mkldnn._is_mkldnn_bf16_supported")
"""`() -> bool`: True if this CPU has the instructions for oneDNN's bfloat16 products."""

onednn_reorder_weight = _bind("ops.mkldnn._reorder_linear_weight")
"""`(weight [N, K], rows) -> opaque copy`: the blocked layout that oneDNN prefers for inputs of `rows` rows."""

onednn_linear = _bind("ops.mkldnn._linear_pointwise.default")
"""`(x, weight, bias, op, scalars, algorithm) -> [..., N]`: a linear layer with the elementwise `op` as its epilogue."""

update_grad_scale_ = _bind("_amp_update_scale_")
"""`(scale, growth_tracker, found_inf, growth_factor, backoff_factor, interval)`: `GradScaler.update` on the device."""

foreach_div_ = _bind("_foreach_div_")
"""`(tensors, divisor)`: divide many tensors in place by a scalar tensor, in few launches."""


def tensor_version(tensor: torch.Tensor) -> int | None:
    """Return a count of the writes to a tensor's memory; None for tensors of `torch.inference_mode`.

    NOTE: writes through `tensor.data` and those of fused optimizers do not count.
    """
    return None if tensor.is_inference() else tensor._version


@functools.cache
def has_int8pack_mm() -> bool:
    """Return True if this PyTorch computes `int8pack_mm` as documented here."""
    x, weight = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(2, 64, dtype=torch.int8)
    try:
        y = int8pack_mm(x, weight, torch.tensor([1.0, 2.0], dtype=x.dtype))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return y.tolist() == [[64.0, 128.0]]


def supports_grad_scale(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if `step` divides by `optimizer.grad_scale` and skips where `optimizer.found_inf` is set."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def silence_capturable_warning(optimizer: torch.optim.Optimizer) -> None:
    """Keep a copied optimizer with `capturable=True` from warning when it steps outside of a graph capture."""
    optimizer._warned_capturable_if_run_uncaptured = True


def inductor_cache_dir() -> str:
    """Return the folder of `torch.compile`'s cache where TORCHINDUCTOR_CACHE_DIR is not set."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # importing Inductor takes a second

    return default_cache_dir()


COMPILED_PREFIX = "_orig_mod."
"""Prefix of the names in the state dict of a module that `torch.compile` wraps."""


def state_dict_metadata(state: Any) -> dict[str, dict[str, Any]]:
    """Return what `Module.state_dict` records of each module, by its path; empty for a plain dict."""
    return getattr(state, "_metadata", None) or {}
