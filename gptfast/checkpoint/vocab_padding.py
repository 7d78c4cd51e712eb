"""Rows of the token embedding beyond the vocabulary: there for speed, in no file and no result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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


def shown(model: GPT, name: str, tensor: Tensor) -> Tensor:
    """A tensor that has the rows of a parameter, as files have it: without the padding.

    Args:
        model: that the parameter belongs to.
        name: of the parameter.
        tensor: [rows, ...], or of another shape that has nothing to hide.
    """
    padded = name in _PADDED and tensor.shape[:1] == (model.config.padded_vocab_size,)
    return tensor[: model.config.vocab_size] if padded else tensor


def padded(model: GPT, name: str, tensor: Tensor) -> Tensor:
    """What `shown` returned, with zeros for the padding."""
    missing = model.config.padded_vocab_size - model.config.vocab_size
    if name not in _PADDED or missing == 0 or tensor.shape[:1] != (model.config.vocab_size,):
        return tensor
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))


def _remove(model: Any, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in _PADDED:
        if prefix + name in state:
            state[prefix + name] = shown(model, name, state[prefix + name])


def _add(model: Any, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name in _PADDED:
        if prefix + name in state:
            state[prefix + name] = padded(model, name, state[prefix + name])
