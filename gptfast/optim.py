"""The optimizers of a run, and their state by the names of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gptfast.model import GPT

NAMES = ("adamw", "muon")

_KEYS: dict[type, set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.Muon: {"momentum_buffer"},
}


def adamw(
    parameters: Sequence[Tensor],
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    device_type: str,
) -> torch.optim.AdamW:
    """AdamW, fused where PyTorch has it so, that decays parameters with two or more dimensions alone."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))


def build(
    name: str, model: GPT, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model's parameters that are trained.

    "adamw" is `GPT.configure_optimizers`. "muon" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) steps
    the blocks' matrices by their orthogonalised momentum, scaled so that AdamW's learning rate and decay serve it (Liu
    et al. 2025, arXiv:2502.16982, section 2.2), and leaves embeddings, norms and biases to AdamW.
    """
    if name == "adamw":
        return [model.configure_optimizers(weight_decay, learning_rate, betas, device_type)]
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = [p for n, p in trained.items() if p.dim() == 2 and n.startswith("transformer.h.")]
    if not hidden:
        raise ValueError("muon is for the matrices of blocks, and none of them is trained; use adamw")
    ids = {id(p) for p in hidden}
    rest = [p for p in trained.values() if id(p) not in ids]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    ]
    if rest:
        optimizers.append(adamw(rest, weight_decay, learning_rate, betas, device_type))
    return optimizers


def state(optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizers' tensors by "parameter/key".

    Args:
        optimizers: of a model.
        names: of its parameters.
    """
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def load_state(optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str], saved: Mapping[str, Any]) -> None:
    """Give the optimizers the tensors that `state` showed, on any device.

    Raises:
        ValueError: of a parameter there is no state, and of others there is.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in saved.items():
        parameter, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter, {})[key] = value
    for optimizer in optimizers:
        content = optimizer.state_dict()
        ours = [names[p] for group in optimizer.param_groups for p in group["params"]]
        # one whose gradients have all overflowed so far has no state, though another has
        if any(name in by_parameter for name in ours):
            for name in ours:
                if by_parameter.get(name, {}).keys() != _KEYS[type(optimizer)]:
                    raise ValueError(f"the optimizer's state lacks {name}: it is of other settings")
            content["state"] = {index: by_parameter[name] for index, name in enumerate(ours)}
        optimizer.load_state_dict(content)
