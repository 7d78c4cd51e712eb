"""Optimizers, their state by parameter name, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant", "wsd")

_STATE_KEYS: dict[type, set[str]] = {
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
    """Build AdamW, fused where PyTorch has a fused kernel. Only parameters with two or more dimensions decay."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu"))


def build(
    name: str,
    named_parameters: Iterable[tuple[str, Tensor]],
    weight_decay: float,
    learning_rate: float,
    betas: tuple[float, float],
    device_type: str,
) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a GPT's trainable parameters.

    "muon" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates the weight matrices of the blocks by
    their orthogonalised momentum, and leaves embeddings, norms and biases to AdamW. Its update is scaled to the RMS of
    AdamW's, so that AdamW's learning rate and weight decay apply (Liu et al. 2025, arXiv:2502.16982, section 2.2).

    Args:
        name: one of `OPTIMIZERS`.
        named_parameters: `model.named_parameters()`; frozen parameters are skipped.
        weight_decay: for parameters with two or more dimensions.
        learning_rate: the initial learning rate.
        betas: decay rates of AdamW's two moments.
        device_type: "cuda" or "cpu", see `adamw`.

    Raises:
        ValueError: "muon" where no matrix of a block is trained.
    """
    trained = {n: p for n, p in named_parameters if p.requires_grad}
    if name == "adamw":
        return [adamw([*trained.values()], weight_decay, learning_rate, betas, device_type)]
    hidden = {n: p for n, p in trained.items() if p.dim() == 2 and n.startswith("transformer.h.")}
    if not hidden:
        raise ValueError("optimizer 'muon' needs a trained weight matrix in a block, got none; use 'adamw'")
    muon = torch.optim.Muon([*hidden.values()], learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
    rest = [p for n, p in trained.items() if n not in hidden]
    return [muon, adamw(rest, weight_decay, learning_rate, betas, device_type)] if rest else [muon]


def state_dict(optimizers: Iterable[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Return the state tensors of a model's optimizers under "parameter/key", with the `names` of its parameters."""
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def load_state_dict(
    optimizers: Iterable[torch.optim.Optimizer], names: Mapping[Tensor, str], saved: Mapping[str, Any]
) -> None:
    """Load the result of `state_dict`, from any device. Hyperparameters stay those of `optimizers`.

    Raises:
        ValueError: the state of a parameter is missing or belongs to another optimizer.
    """
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, value in saved.items():
        parameter, _, key = name.rpartition("/")
        by_parameter.setdefault(parameter, {})[key] = value
    for optimizer in optimizers:
        content = optimizer.state_dict()
        own = [names[p] for group in optimizer.param_groups for p in group["params"]]
        # an optimizer has no state if its float16 gradients have overflowed in every step
        if any(name in by_parameter for name in own):
            for name in own:
                if by_parameter.get(name, {}).keys() != _STATE_KEYS[type(optimizer)]:
                    raise ValueError(f"the optimizer state does not fit {name}; continue with the settings of the run")
            content["state"] = {index: by_parameter[name] for index, name in enumerate(own)}
        optimizer.load_state_dict(content)


def learning_rate(
    schedule: str, step: int, steps: int, peak: float, lowest: float, warmup: int, decay_share: float
) -> float:
    """Return the learning rate of a step: linear warm-up to `peak`, then one of three schedules.

    Args:
        schedule: "cosine" decays to `lowest` at the last step (Loshchilov and Hutter 2016, arXiv:1608.03983);
            "constant" stays at `peak`; "wsd" (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395, section 4)
            decays linearly at the end, so that a run can be extended from a checkpoint before its decay.
        step: index from 0.
        steps: length of the whole run.
        peak: the highest rate.
        lowest: the final rate.
        warmup: number of warm-up steps.
        decay_share: fraction of the steps after the warm-up in which "wsd" decays.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        factor = 1.0
    elif schedule == "cosine":
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        factor = min(1.0, (1.0 - progress) / decay_share) if decay_share > 0.0 else 1.0
    return lowest + factor * (peak - lowest)
