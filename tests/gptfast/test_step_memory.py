"""Peak memory of a training step relative to eager PyTorch, at GPT-2's proportions made small."""

from __future__ import annotations

import functools

import pytest
import torch

import kernels
from gptfast import GPT, GPTConfig
from tests.support.memory import peak_bytes
from tests.support.oracle import DEVICE

# the ratios of vocabulary, width, tokens and layers are those of GPT-2
CONFIG = GPTConfig(block_size=64, vocab_size=2096, n_layer=12, n_head=2, n_embd=32)
BATCH = 4
LOGITS = BATCH * 64 * 2096 * 2


@functools.cache
def peak(backend: str, compiled: bool = False, residual: torch.dtype | None = None, checkpointing: bool = False) -> int:
    """Return peak bytes of forward and backward under autocast, without the weights."""
    model = GPT(CONFIG, backend).to(DEVICE)
    model.set_residual_dtype(residual)
    model.set_activation_checkpointing(checkpointing)
    if backend == "triton":  # as 512 MiB relate to the 3.3 GB of logits of 32 x 1024 tokens
        workspace = LOGITS * 2**29 // (32 * 1024 * 50_304 * 2)
        model.backend.linear_cross_entropy = functools.partial(kernels.linear_cross_entropy, workspace_bytes=workspace)
    forward = torch.compile(model, fullgraph=True) if compiled else model
    idx = torch.randint(2096, (BATCH, 64), device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            _, loss = forward(idx, idx)
        loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    return peak_bytes(step)


@pytest.mark.slow
def test_triton_step_needs_less_memory_than_eager():
    assert peak("triton") < 0.6 * peak("eager", compiled=True)
    assert peak("triton") < 0.4 * peak("eager")


@pytest.mark.slow
def test_bfloat16_residual_stream_and_checkpointing_need_less_memory():
    assert peak("triton", residual=torch.bfloat16) < 0.92 * peak("triton")
    assert peak("triton", checkpointing=True) < 0.45 * peak("triton")
