"""Compile, and optionally autotune, a model's kernels before its first step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from kernels import operators, runtime
from kernels.workload import ModelShape, Workload


def warmup(
    config: ModelShape, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cuda", batch_size: int = 1,
    autotune: bool = False, residual_dtype: torch.dtype | None = None, int8: bool = False,
) -> None:  # fmt: skip
    """Compile every kernel that a model's training and generation launch, and autotune if requested.

    Triton compiles a kernel when it first runs and caches the result on disk. This call moves those pauses, and those
    of tuning, before the first step. Call it under the `torch.autocast` of the model's steps, if there is one.

    Args:
        config: the model's shape, for instance a `gptfast.GPTConfig`.
        dtype: of the model's parameters.
        device: the GPU that the model runs on.
        batch_size: sequences of `config.block_size` tokens in a batch. Most sizes launch the same kernels; autotuning
            measures at this one.
        autotune: measure the candidate configurations of each kernel and keep the fastest, in memory and on disk; see
            `kernels.tuning`.
        residual_dtype: of the residual stream, if not that of the parameters.
        int8: also compile the kernels of a model that `gptfast.quantize` has converted.

    Raises:
        ValueError: Triton cannot run on the device; the message has the reason.
        TypeError: the kernels do not support the dtype.
    """
    device = torch.device(device)
    if dtype not in runtime.DTYPES:
        raise TypeError(f"warmup: dtype must be float32, float16 or bfloat16, got {dtype}")
    if batch_size < 1:
        raise ValueError(f"warmup: batch_size must be at least 1, got {batch_size}")
    reason = runtime.unsupported_reason(device)
    if reason is not None:
        raise ValueError(f"warmup: {reason}")
    from kernels import tuning  # imports Triton

    step = Workload(config, "training", batch_size, config.block_size, dtype, residual_dtype or dtype, device)
    with tuning.autotune() if autotune else nullcontext():
        for dropout_p in {0.0, config.dropout}:
            with torch.enable_grad():
                _run(replace(step, dropout_p=dropout_p))
        with torch.no_grad():
            # prompts have any length: Triton compiles for multiples of 16, for others, and for 1
            for length in (1, 16, 17, config.block_size):
                _run(replace(step, stage="prefill", length=min(length, config.block_size)))
            _run(replace(step, stage="decode", int8=int8))


def _run(workload: Workload) -> None:
    for module in operators.modules():
        for call in module.warmup_cases(workload):
            outputs = call()
            if workload.stage == "training":
                outputs = [outputs] if isinstance(outputs, Tensor) else outputs
                torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
