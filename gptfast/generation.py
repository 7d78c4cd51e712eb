"""Sampling text from a GPT."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast.cache import KVCache

if TYPE_CHECKING:
    from gptfast.model import GPT


@torch.no_grad()
def generate(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue each row of `idx` one sampled token at a time; beyond `block_size` the model sees the last tokens.

    Keys and values are kept, so that each token is computed once, until the window of `block_size` tokens is full and
    moves on with every token: then it is computed anew.

    Dropout is off while it runs. The model is left in the mode it was in.

    Args:
        model: the GPT.
        idx: [B, T] int64 token ids, T >= 1.
        max_new_tokens: tokens to add to each row.
        temperature: divides the logits; any size, down to 0, which takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        generator: makes the sampling repeatable; on the device of `idx`.

    Returns:
        [B, T + max_new_tokens] int64.

    Raises:
        ValueError: a setting out of range, or token ids out of range.
    """
    if idx.dim() != 2 or idx.shape[1] == 0:
        raise ValueError(f"idx must be [B, T] with T >= 1, got shape {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if not (temperature >= 0.0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    was_training = model.training
    model.eval()
    try:
        window = model.config.block_size
        cache = KVCache(model.config.n_layer, min(window, idx.shape[1] + max_new_tokens))
        for _ in range(max_new_tokens):
            # positions are counted from the window's start: once it moves, all of it is new
            if idx.shape[1] > window or cache.length == 0:
                cache.clear()
            logits, _ = model(idx[:, -window:][:, cache.length :], cache=cache)
            following = sample(logits[:, -1], temperature, top_k, generator)  # [B, 1]
            idx = torch.cat((idx, following), dim=1)
    finally:
        model.train(was_training)
    return idx


def sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token id per row of `logits` [B, V], as [B, 1] int64. Arguments as `generate`."""
    if temperature == 0.0:
        return logits.argmax(dim=-1, keepdim=True)
    # below the largest logit, so that a small temperature divides to 0 and -inf, not to inf; 0 / 0 where it underflows
    below = logits.float() - logits.float().amax(dim=-1, keepdim=True)
    logits = (below / temperature).masked_fill(below == 0.0, 0.0)
    if top_k is not None:
        kth_best = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < kth_best, float("-inf"))
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)
