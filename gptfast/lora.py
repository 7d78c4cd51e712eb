"""Low-rank adaptation: fine-tuning by two thin matrices beside each of some weights (Hu et al. 2021, arXiv:2106.09685).

    lora.apply(model, rank=8, alpha=16.0, targets=["*.attn.c_attn", "*.attn.c_proj"])
    optimizer = model.configure_optimizers(0.0, 1e-4, (0.9, 0.99), "cuda")  # of the adapters alone
    ...
    save(lora.adapters(model))  # megabytes, or lora.merged_state_dict(model) for a file that any GPT loads

A gradient and the optimizer's state are kept for the adapters alone. Arithmetic is not saved: their gradients are taken
from that of the whole weight, which is freed at once.

Until `merge`, names in `model.state_dict()` are those that `torch.nn.utils.parametrize` gives, and padding of the
vocabulary in `lm_head` is not hidden: files are to have `adapters` or `merged_state_dict`. `copy.deepcopy` works on a
model with adapters; `pickle`, and so `torch.save` of the model itself, does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gptfast.model import GPT
from gptfast.training.freeze import matching
from kernels import runtime


class _Adapter(nn.Module):
    """Takes a weight [out, in] to weight + scale * B @ A, with A [rank, in] and B [out, rank]."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.lora_b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        # autocast would round A and B before the product, and what comes back to them in the backward
        inside = runtime.autocast_dtype(weight.device) is not None
        with torch.autocast(weight.device.type, enabled=False) if inside else nullcontext():
            return torch.addmm(weight, self.lora_b, self.lora_a, alpha=self.scale)


def apply(model: GPT, rank: int, alpha: float, targets: Sequence[str]) -> list[str]:
    """Add an adapter to linear layers: their weight is now W + (alpha / rank) * B @ A, and A and B alone are trained.

    A [rank, in] is drawn as in the paper's code, uniformly by He et al. 2015 (arXiv:1502.01852) with a=sqrt(5), and B
    [out, rank] is zero: the model computes what it did. Every parameter that it had gets `requires_grad=False`, biases,
    norms and embeddings too. To be called before the optimizer is made, and after weights are loaded.

    Args:
        model: without adapters.
        rank: of the change of a weight, at least 1.
        alpha: the size of the change, by which results of one rank are kept with another; above 0.
        targets: patterns as of file names, for whole names of `nn.Linear` layers: "transformer.h.0.attn.c_attn",
            "*.attn.*", "*.mlp.c_fc".

    Returns:
        The names of the adapted layers, in the model's order.

    Raises:
        ValueError: a rank or alpha out of range, a pattern that matches no linear layer, no patterns, `lm_head` where
            it is the token embedding, or a model that has adapters. The model is then as it was.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha must be above 0 and finite, got {alpha!r}")
    if is_applied(model):
        raise ValueError(f"the model has adapters already, such as on {next(iter(_adapted(model)))}; merge them first")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = matching(targets, linear, "linear layer")
    if not names:
        raise ValueError("targets must be at least one pattern, got none; accepted: '*.attn.*' and the like")
    if "lm_head" in names and model.config.tie_weights:
        raise ValueError(
            f"targets {list(targets)} match lm_head, which is the token embedding (tie_weights=True); accepted: "
            "layers in transformer.*"
        )
    model.requires_grad_(False)
    for name in names:
        # Not a module around the layer, which would be passed by: the feed-forward gives `c_fc.weight` and
        # `c_proj.weight` to one operator and calls neither layer, and so does the Triton loss with `lm_head.weight`.
        parametrize.register_parametrization(linear[name], "weight", _Adapter(linear[name].weight, rank, alpha))
    return names


def is_applied(model: GPT) -> bool:
    """Whether the model has adapters."""
    return bool(_adapted(model))


@torch.no_grad()
def merge(model: GPT) -> None:
    """Fold the adapters into the weights, W + (alpha / rank) * B @ A, which leaves a GPT as it was before `apply`.

    Names, their order, types of layers and the parameters themselves are those of before, and the logits those of the
    adapted model to rounding. Every parameter gets `requires_grad=True`, also one that was frozen before `apply`.
    Generation is faster after it: the weight of an adapted layer is computed anew at each use.

    Raises:
        ValueError: a model without adapters.
    """
    layers = _adapted(model)
    if not layers:
        raise ValueError("the model has no adapters to merge; lora.apply adds them")
    for layer in layers.values():
        weight, bias = layer.parametrizations.weight.original, layer.bias
        weight.copy_(layer.weight)
        # `remove_parametrizations` takes the weight out of a class that copies of the model share with it, and puts it
        # behind the bias, so that an optimizer's saved state would fit no more
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations, layer.bias
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", bias)
    model.requires_grad_(True)


@torch.no_grad()
def merged_state_dict(model: GPT) -> dict[str, Tensor]:
    """What `model.state_dict()` would be after `merge`; the model stays as it is.

    Names, order and shapes are those of a plain GPT: padding of the vocabulary is left out. Weights of adapted layers
    are new tensors, the others the model's own. For a model without adapters it is `model.state_dict()`.
    """
    weights = {name: _shown(model, name, layer.weight) for name, layer in _adapted(model).items()}
    merged = {}
    for name, tensor in model.state_dict().items():
        outside, inside, _ = name.partition(".parametrizations.")
        layer = outside if inside else name.rpartition(".")[0]
        if layer in weights:  # before the bias, which comes first here
            merged[f"{layer}.weight"] = weights[layer]
        if not inside:
            merged[name] = tensor
    return merged


def adapters(model: GPT) -> dict[str, Tensor]:
    """The matrices of the adapters, for a file of their own, which has to keep `alpha` beside them.

    Returns:
        "transformer.h.0.attn.c_attn.lora_a" [rank, in], "transformer.h.0.attn.c_attn.lora_b" [out, rank] and so on:
        the parameters, detached, that of `lm_head` without padding of the vocabulary. Without adapters, nothing.
    """
    tensors = {}
    for name, layer in _adapted(model).items():
        adapter = layer.parametrizations.weight[0]
        tensors[f"{name}.lora_a"] = adapter.lora_a.detach()
        tensors[f"{name}.lora_b"] = _shown(model, name, adapter.lora_b.detach())
    return tensors


@torch.no_grad()
def load_adapters(model: GPT, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `adapters` returned into a model with the same adapters, that is after the same `apply`.

    Args:
        model: with adapters.
        tensors: see `adapters`; on any device, in any floating dtype.

    Raises:
        ValueError: a tensor is missing, unknown or misshapen; the first one is named. The model is then as it was.
    """
    own = adapters(model)
    for name, parameter in own.items():
        if name not in tensors:
            raise ValueError(f"adapter {name} is missing from the {len(tensors)} tensors given")
        if tensors[name].shape != parameter.shape:
            given, needed = tuple(tensors[name].shape), tuple(parameter.shape)
            raise ValueError(f"adapter {name} has shape {given}, the model's has {needed}")
    for name in tensors:
        if name not in own:
            accepted = f"accepted: {', '.join(list(own)[:2])}, ..." if own else "lora.apply adds adapters"
            raise ValueError(f"adapter {name} is unknown to the model; {accepted}")
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def _adapted(model: GPT) -> dict[str, Any]:
    """The layers that have an adapter, by name; no type knows of what parametrize adds to `nn.Linear`."""
    return {
        name: module
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], _Adapter)
    }


def _shown(model: GPT, layer: str, tensor: Tensor) -> Tensor:
    """A tensor whose rows are the layer's outputs, without those that `gptfast.checkpoint.vocab_padding` hides."""
    return tensor[: model.config.vocab_size] if layer == "lm_head" else tensor
