"""FLOPs of a GPT by thop, with the rules that its modules need.

thop (github.com/Lyken17/pytorch-OpCounter) counts by hooks on modules. It sees neither `torch.nn.functional` products
nor attention, and knows registered module types only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gptfast import GPT
from gptfast.model import MLP, CausalSelfAttention


def count(model: GPT, batch: int, length: int) -> int:
    """Count the matrix product FLOPs of a forward pass with the logits of every position.

    thop runs a copy of the model on the meta device: its hooks and buffers never reach the model, whatever its size.

    Raises:
        ImportError: thop is not installed, or the setuptools that it needs since Python 3.12.
        ValueError: a length beyond the model's `block_size`.
    """
    from thop import profile

    tensors = [*model.parameters(), *model.buffers()]
    meta = copy.deepcopy(model, memo={id(tensor): tensor.to("meta") for tensor in tensors})
    idx = torch.zeros(batch, length, dtype=torch.long, device="meta")
    rules = {CausalSelfAttention: _attention, MLP: _mlp}
    products, _ = profile(meta, (idx, idx), custom_ops=rules, verbose=False)  # targets make the head see all positions
    return 2 * int(products)  # thop counts multiply-accumulates


def _attention(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Both projections, the scores and their product with the values. A module's rule hides its children."""
    batch, length, width = inputs[0].shape
    weights = module.c_attn.weight.numel() + module.c_proj.weight.numel()
    module.total_ops += torch.DoubleTensor([batch * length * weights + 2 * batch * length * length * width])


def _mlp(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Both products, whose layers never run as modules."""
    batch, length, _ = inputs[0].shape
    weights = module.c_fc.weight.numel() + module.c_proj.weight.numel()
    module.total_ops += torch.DoubleTensor([batch * length * weights])
