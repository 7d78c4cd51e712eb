"""Vocabulary padding: rows of the token embedding and the head that exist in memory only, for speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptfast.config import GPTConfig

EMBEDDING, HEAD = _PADDED = ("transformer.wte.weight", "lm_head.weight")


def hide_in_state_dict(model: nn.Module) -> None:
    """Make a GPT's `state_dict` drop the padding, and its `load_state_dict` add it."""
    model.register_state_dict_post_hook(_unpad_state_dict)
    model.register_load_state_dict_pre_hook(_pad_state_dict)


def unpad(config: GPTConfig, name: str, tensor: Tensor) -> Tensor:
    """Drop the padded rows of a parameter, or of optimizer state of its shape.

    Args:
        config: the model's shape.
        name: of the parameter.
        tensor: [rows, ...]; other parameters and shapes pass through.
    """
    padded = name in _PADDED and tensor.shape[:1] == (config.padded_vocab_size,)
    return tensor[: config.vocab_size] if padded else tensor


def pad(config: GPTConfig, name: str, tensor: Tensor) -> Tensor:
    """Append zeros for the padded rows: the inverse of `unpad`."""
    missing = config.padded_vocab_size - config.vocab_size
    if name not in _PADDED or missing == 0 or tensor.shape[:1] != (config.vocab_size,):
        return tensor
    return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:])))


def _unpad_state_dict(model: Any, state_dict: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in _PADDED:
        if prefix + name in state_dict:
            state_dict[prefix + name] = unpad(model.config, name, state_dict[prefix + name])


def _pad_state_dict(model: Any, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    for name in _PADDED:
        if prefix + name in state_dict:
            state_dict[prefix + name] = pad(model.config, name, state_dict[prefix + name])
