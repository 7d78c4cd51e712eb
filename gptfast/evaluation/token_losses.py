"""The loss of each single token."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import devices
from gptfast.generation.autoregressive import evaluating
from gptfast.model import GPT


@torch.no_grad()
def losses(model: GPT, idx: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """What each target costs in nats: minus its log-probability after the tokens of its row up to there.

    Args:
        model: left in the mode it was in.
        idx: [B, T] int64 token ids on the CPU, T at most `block_size`.
        targets: [B, T] int64, what follows each of them; negative ones are not asked for.
        dtype: of matrix products.

    Returns:
        [B, T] float64 on the CPU, 0 where nothing is asked for.

    Raises:
        ValueError: a token id out of range.
        RuntimeError: a loss that is no number.
    """
    highest = int(torch.maximum(idx.max(), targets.max()))
    if highest >= model.config.vocab_size:
        raise ValueError(f"token id {highest} is out of range; accepted: 0 to {model.config.vocab_size - 1}")
    device = model.transformer.wte.weight.device
    asked = targets >= 0  # [B, T]
    with evaluating(model), devices.autocast(device, dtype):
        x = model.transformer(idx.to(device))[asked.to(device)]  # [N, C]
        wanted = targets[asked].to(device)  # [N]
        found = model.backend.token_losses(x, model.lm_head, wanted, model.config.vocab_size).cpu().double()  # [N]
    if not found.isfinite().all():
        wrong = found[~found.isfinite()][0].item()
        raise RuntimeError(
            f"the model gives a token a loss of {wrong}: its weights are damaged, or beyond what --dtype "
            f"{str(dtype).removeprefix('torch.')} can tell; try --dtype float32"
        )
    return torch.zeros(targets.shape, dtype=torch.float64).masked_scatter_(asked.cpu(), found)
