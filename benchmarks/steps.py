"""The training step that is measured: forward, backward, gradient clipping and AdamW."""

from __future__ import annotations

import platform
from types import ModuleType

import torch
from torch import Tensor

import gptfast

# nanoGPT's recipe for a laptop's CPU, and GPT-2 124M for a GPU
CPU_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65, "bias": False}
GPU_SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304}
CPU_BATCH, GPU_BATCH = 12, 16


class TrainingStep:
    """A model with its optimizer and one random batch; calling it does one step.

    Args:
        package: `gptfast`, or another module with nanoGPT's `GPT` and `GPTConfig`.
        device: where it runs; decides the shape and the batch.
        settings: further fields of `GPTConfig`.
        options: further arguments of `GPT`.
    """

    def __init__(self, package: ModuleType, device: torch.device, settings: dict, **options) -> None:
        on_gpu = device.type == "cuda"
        shape, batch = (GPU_SHAPE, GPU_BATCH) if on_gpu else (CPU_SHAPE, CPU_BATCH)
        torch.manual_seed(0)
        self.model = package.GPT(package.GPTConfig(**shape, **settings), **options).to(device)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device.type)
        self.idx, self.targets = torch.randint(shape["vocab_size"], (2, batch, shape["block_size"])).to(device)
        self.tokens = self.idx.numel()
        self.device = device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)

    def __call__(self) -> Tensor:
        with self.autocast:
            _, loss = self.model(self.idx, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach()


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gptfast": gptfast.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            return next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
