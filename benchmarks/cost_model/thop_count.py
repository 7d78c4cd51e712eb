"""FLOPs of a GPT by thop, with the rules that its modules need.

thop (github.com/Lyken17/pytorch-OpCounter) hooks modules, so that it sees neither products by `torch.nn.functional`
nor attention, and knows only types that it was told of. It counts multiply-accumulates: two FLOPs each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import GPT
from gptfast.model import MLP, CausalSelfAttention, LayerNorm

# thop's own count for nn.LayerNorm: mean, variance, normalise, scale; the closed form leaves norms out, as PaLM does
NORM_OPERATIONS_PER_ELEMENT = 4

Rule = Callable[[Any, tuple[Tensor, ...], Tensor], None]


@dataclass(frozen=True)
class Count:
    """What thop counts for one forward pass: FLOPs of the matrix products, and the operations of the norms, which it
    adds to its multiply-accumulates by its own definition.
    """

    matrix_flops: int
    norm_operations: int


def count(model: GPT, batch: int, length: int) -> Count:
    """FLOPs of a forward pass with the logits of every position.

    A copy without data is counted, on the meta device: the model is neither changed nor run, whatever its size.

    Args:
        model: the GPT, not compiled.
        batch: sequences.
        length: tokens of each.

    Raises:
        ImportError: thop is not installed, or the setuptools that it needs since Python 3.12.
        ValueError: a length beyond the model's `block_size`.
    """
    products = _profile(model, batch, length, {CausalSelfAttention: _attention, MLP: _mlp, LayerNorm: _nothing})
    norms = _profile(
        model, batch, length, {CausalSelfAttention: _nothing, MLP: _nothing, nn.Linear: _nothing, LayerNorm: _norm}
    )
    return Count(matrix_flops=2 * products, norm_operations=norms)


def _profile(model: GPT, batch: int, length: int, rules: dict[type[nn.Module], Rule]) -> int:
    from thop import profile

    idx = torch.zeros(batch, length, dtype=torch.long, device="meta")
    # with targets the head sees every position; thop leaves buffers behind in what it counts
    operations, _ = profile(_meta_copy(model), (idx, idx), custom_ops=rules, verbose=False)
    return int(operations)


def _meta_copy(model: GPT) -> GPT:
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor.to("meta") for tensor in tensors})


def _add(module: Any, operations: int) -> None:
    module.total_ops += torch.DoubleTensor([operations])


def _attention(module: CausalSelfAttention, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Both projections, the scores and their product with the values. A rule for a module hides its children."""
    batch, length, width = inputs[0].shape
    weights = module.c_attn.weight.numel() + module.c_proj.weight.numel()
    _add(module, batch * length * weights + 2 * batch * length * length * width)


def _mlp(module: MLP, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Both products: the operator takes the weights, so that thop does not see the layers run."""
    batch, length, _ = inputs[0].shape
    _add(module, batch * length * (module.c_fc.weight.numel() + module.c_proj.weight.numel()))


def _norm(module: LayerNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _add(module, NORM_OPERATIONS_PER_ELEMENT * inputs[0].numel())


def _nothing(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """A module whose count is not asked for."""
