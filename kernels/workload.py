"""Types of the codegen and warm-up cases that an operator's file declares.

Two functions by convention, collected from every operator: `codegen_cases(dtype)` yields launches for
`kernels.codegen`, `warmup_cases(workload)` yields calls for `kernels.warmup`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kernels import runtime

# a name, a host function that launches kernels, and its arguments on the CPU
CodegenCase = tuple[str, Callable[..., object], tuple[Any, ...]]
# a call of the public operator, whose outputs are differentiated in the training stage
WarmupCase = Callable[[], Tensor | tuple[Tensor, ...]]


class ModelShape(Protocol):
    """The fields of a `gptfast.GPTConfig` that decide which kernels a model launches."""

    block_size: int
    vocab_size: int
    n_head: int
    n_embd: int
    bias: bool
    dropout: float

    @property
    def activation(self) -> str: ...

    @property
    def norm_position(self) -> str: ...

    @property
    def padded_vocab_size(self) -> int: ...

    @property
    def has_qkv_bias(self) -> bool: ...


@dataclass(frozen=True)
class Workload:
    """One training step, or one forward of generation, of a model."""

    model: ModelShape
    stage: Literal["training", "prefill", "decode"]
    batch_size: int
    length: int  # tokens of each sequence; in the decode stage, those in the KV cache
    dtype: torch.dtype  # of the parameters
    residual_dtype: torch.dtype
    device: torch.device
    dropout_p: float = 0.0
    int8: bool = False  # the weights are quantized

    @property
    def head_size(self) -> int:
        return self.model.n_embd // self.model.n_head

    @property
    def matmul_dtype(self) -> torch.dtype:
        """The dtype of linear layers' outputs: autocast's, else that of the parameters."""
        return runtime.autocast_dtype(self.device) or self.dtype

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A random leaf that requires a gradient, by default in the dtype of the parameters."""
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device).normal_(std=0.02).requires_grad_()
