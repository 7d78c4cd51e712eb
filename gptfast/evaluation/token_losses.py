"""Per-token cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import devices
from gptfast.generation.decoder import evaluating
from gptfast.model import GPT


@torch.no_grad()
def token_losses(model: GPT, idx: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the cross-entropy of each target in nats, in evaluation mode.

    Args:
        model: the GPT; its mode is restored.
        idx: [B, T] int64 token ids on the CPU, T at most `block_size`.
        targets: [B, T] int64, the token after each position; negative targets are skipped.
        dtype: dtype of matmuls.

    Returns:
        [B, T] float64 on the CPU, 0 at skipped targets.

    Raises:
        ValueError: a token id is out of range.
        RuntimeError: a loss is not finite.
    """
    highest = int(torch.maximum(idx.max(), targets.max()))
    if highest >= model.config.vocab_size:
        raise ValueError(f"token id {highest} is out of range; accepted: 0 to {model.config.vocab_size - 1}")
    device = model.transformer.wte.weight.device
    counted = targets >= 0  # [B, T]
    with evaluating(model), devices.autocast(device, dtype):
        x = model.transformer(idx.to(device))[counted.to(device)]  # [N, C]
        wanted = targets[counted].to(device)  # [N]
        losses = model.backend.token_losses(x, model.lm_head, wanted, model.config.vocab_size).cpu().double()  # [N]
    if not losses.isfinite().all():
        value = losses[~losses.isfinite()][0].item()
        raise RuntimeError(
            f"a token has a loss of {value} in {str(dtype).removeprefix('torch.')}: the weights are damaged or "
            "overflow; try --dtype float32"
        )
    return torch.zeros(targets.shape, dtype=torch.float64).masked_scatter_(counted, losses)
