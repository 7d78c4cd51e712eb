"""Fine-tuning a part of a model: LoRA adapters (Hu et al. 2021, arXiv:2106.09685) and frozen parameters.

    lora.apply(model, rank=8, alpha=16.0, targets=["*.attn.c_attn", "*.attn.c_proj"])
    optimizer = model.configure_optimizers(0.0, 1e-4, (0.9, 0.99), "cuda")  # holds only the adapters
    ...
    save(lora.adapters(model))  # megabytes, or lora.merged_state_dict(model) for a file that any GPT loads

Only adapters have gradients and optimizer state. The arithmetic of a step stays the same: autograd computes the
gradient of the full weight, derives the adapters' gradients from it and frees it.

NOTE: until `merge`, `model.state_dict()` has the names of `torch.nn.utils.parametrize` and keeps the padded rows of
`lm_head`. Write `adapters` or `merged_state_dict` to files. `copy.deepcopy` works on a model with adapters; `pickle`
does not, and so neither does `torch.save(model)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernels import runtime


class _Adapter(nn.Module):
    """Parametrization of a weight [out, in] as weight + scale * B @ A, with A [rank, in] and B [out, rank]."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.lora_b = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        # autocast would round A, B and their gradients
        autocast = runtime.autocast_dtype(weight.device) is not None
        with torch.autocast(weight.device.type, enabled=False) if autocast else nullcontext():
            return torch.addmm(weight, self.lora_b, self.lora_a, alpha=self.scale)


def apply(model: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> list[str]:
    """Reparametrize linear layers as W + (alpha / rank) * B @ A and train only A and B.

    A [rank, in] starts with the uniform initialisation of the paper's code (He et al. 2015, arXiv:1502.01852, with
    a=sqrt(5)) and B [out, rank] with zeros, so the model's outputs do not change. All other parameters get
    `requires_grad=False`, biases, norms and embeddings included. Call it after weights are loaded and before the
    optimizer is built.

    Args:
        model: a GPT without adapters.
        rank: of the weight update, at least 1.
        alpha: scale of the weight update, above 0. Results tuned with one rank carry over to another.
        targets: shell-style patterns of `nn.Linear` names: "transformer.h.0.attn.c_attn", "*.attn.*", "*.mlp.*".

    Returns:
        Names of the adapted layers, in the model's order.

    Raises:
        ValueError: a rank or alpha out of range, a pattern that matches no linear layer, no patterns, `lm_head` with
            tied weights, or a model that has adapters. The model is unchanged then.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}")
    if is_applied(model):
        raise ValueError(f"model has adapters already, such as on {next(iter(_adapted(model)))}; merge them first")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = _match_names(targets, linear, "linear layer")
    if not names:
        raise ValueError("targets must have at least one pattern, got none; accepted: patterns such as '*.attn.*'")
    config: Any = model.config
    if "lm_head" in names and config.tie_weights:
        raise ValueError(
            f"targets {list(targets)} match lm_head, which is the token embedding (tie_weights=True); accepted: "
            "layers in transformer.*"
        )
    model.requires_grad_(False)
    for name in names:
        # NOTE: a wrapper around the layer would never run: the operators of feed-forward and loss read the layers'
        # weights without calling them
        parametrize.register_parametrization(linear[name], "weight", _Adapter(linear[name].weight, rank, alpha))
    return names


def is_applied(model: nn.Module) -> bool:
    """Return True if the model has adapters."""
    return bool(_adapted(model))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold the adapters into the weights, W + (alpha / rank) * B @ A, and restore the plain layers.

    Parameter objects, names, their order and layer types are those from before `apply`; logits equal the adapted
    model's up to rounding. Every parameter gets `requires_grad=True`, even if it was frozen before `apply`. Generation
    becomes faster: an adapted layer computes its weight at each use.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = _adapted(model)
    if not layers:
        raise ValueError("model has no adapters to merge; add them with lora.apply")
    for layer in layers.values():
        weight, bias = layer.parametrizations.weight.original, layer.bias
        weight.copy_(layer.weight)
        # `remove_parametrizations` would delete the weight from a class that copies of the model share, and register
        # it behind the bias; an optimizer's saved state relies on the order of parameters
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations, layer.bias
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", bias)
    model.requires_grad_(True)


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that the model would have after `merge`, without changing the model.

    Names, order and shapes are those of a plain GPT, without padded vocabulary rows. Weights of adapted layers are new
    tensors; all others share the model's memory. Without adapters it equals `model.state_dict()`.
    """
    weights = {name: _without_padding(model, name, layer.weight) for name, layer in _adapted(model).items()}
    merged = {}
    for name, tensor in model.state_dict().items():
        outside, parametrized, _ = name.partition(".parametrizations.")
        layer = outside if parametrized else name.rpartition(".")[0]
        if layer in weights:  # the bias comes first here, the weight in a plain layer
            merged[f"{layer}.weight"] = weights[layer]
        if not parametrized:
            merged[name] = tensor
    return merged


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters' matrices. A file of them must also store `alpha`.

    Returns:
        Detached parameters by name: "transformer.h.0.attn.c_attn.lora_a" [rank, in], "...lora_b" [out, rank] and so
        on. The matrix of `lm_head` has no padded vocabulary rows. Empty without adapters.
    """
    tensors = {}
    for name, layer in _adapted(model).items():
        adapter = layer.parametrizations.weight[0]
        tensors[f"{name}.lora_a"] = adapter.lora_a.detach()
        tensors[f"{name}.lora_b"] = _without_padding(model, name, adapter.lora_b.detach())
    return tensors


@torch.no_grad()
def load_adapters(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors from `adapters` into a model with the same adapters.

    Args:
        model: after the same `apply`.
        tensors: see `adapters`; any device and floating dtype.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape. The model is unchanged then.
    """
    own = adapters(model)
    for name in {**own, **tensors}:
        given, needed = (tuple(each[name].shape) if name in each else "none" for each in (tensors, own))
        if given != needed:
            raise ValueError(
                f"adapter {name}: got {given}, the model has {needed}; call lora.apply as for the saved adapters"
            )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Set `requires_grad=False` for the parameters whose name matches one of the patterns.

    Call it before the optimizer is built: `GPT.configure_optimizers` skips frozen parameters. A tied parameter matches
    by either of its names, "transformer.wte.weight" or "lm_head.weight".

    Args:
        model: any module.
        patterns: shell-style patterns of full names: "transformer.h.[0-5].*", "transformer.wte.*".

    Returns:
        Names of the parameters that matched, as `named_parameters()` lists them: tied ones once.

    Raises:
        ValueError: a pattern that matches no parameter, or no parameter is left to train. The model is unchanged then.
    """
    all_names = dict(model.named_parameters(remove_duplicate=False))
    matched = {all_names[name] for name in _match_names(patterns, all_names, "parameter")}
    if not any(p.requires_grad and p not in matched for p in model.parameters()):
        quoted = ", ".join(map(repr, patterns))
        raise ValueError(f"patterns {quoted} leave nothing to train; leave out at least one parameter")
    for parameter in matched:
        parameter.requires_grad_(False)
    return [name for name, parameter in model.named_parameters() if parameter in matched]


def _match_names(patterns: Sequence[str], names: Iterable[str], kind: str) -> list[str]:
    """Return the names that match a pattern, in the order of `names`; each pattern must match one."""
    if isinstance(patterns, str):  # "*" among its letters would match everything
        raise ValueError(f"patterns must be a sequence of strings, got {patterns!r}; accepted: [{patterns!r}]")
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no {kind} matches {pattern!r}; accepted: names such as {', '.join(names[:4])}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _adapted(model: nn.Module) -> dict[str, Any]:
    """Return the layers with an adapter by name. `Any`, because parametrize adds attributes to them."""
    return {
        name: module
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight") and isinstance(module.parametrizations.weight[0], _Adapter)
    }


def _without_padding(model: nn.Module, layer: str, tensor: Tensor) -> Tensor:
    """Drop the padded vocabulary rows of a tensor [out, ...] of `lm_head`, as `vocab_padding` does in state dicts."""
    config: Any = model.config
    return tensor[: config.vocab_size] if layer == "lm_head" else tensor
