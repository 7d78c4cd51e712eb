"""Rows of the token embedding beyond the vocabulary: there for speed, in no file and no result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gptfast.model import GPT

_PADDED = ("transformer.wte.weight", "lm_head.weight")


def hide(model: GPT) -> None:
    """Have `state_dict` show, and `load_state_dict` take, the rows of the vocabulary alone."""
    model.register_state_dict_post_hook(_remove)
    model.register_load_state_dict_pre_hook(_add)


@torch.no_grad()
def clear(model: GPT) -> None:
    """Set the padding to zero. There it stays: no token looks it up, and the loss sends it no gradient."""
    for weight in (model.transformer.wte.weight, model.lm_head.weight):
        weight[model.config.vocab_size :] = 0.0


def _remove(model: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
    size, padded = model.config.vocab_size, model.config.padded_vocab_size
    for name in _PADDED:
        if size < padded and prefix + name in state:
            state[prefix + name] = state[prefix + name][:size]


def _add(model: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    size, padded = model.config.vocab_size, model.config.padded_vocab_size
    for name in _PADDED:
        weight = state.get(prefix + name)
        if size < padded and weight is not None and weight.shape[:1] == (size,):
            state[prefix + name] = torch.cat((weight, weight.new_zeros(padded - size, *weight.shape[1:])))
