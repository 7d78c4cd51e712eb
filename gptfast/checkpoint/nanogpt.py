"""nanoGPT's checkpoints, and the activation that weights were trained with, which nanoGPT's settings do not name.

nanoGPT's MLP computes GELU by erf, with `nn.GELU`. Older versions have no such module and compute the tanh
approximation, as GPT-2 and this package's default do. The metadata that PyTorch attaches to a `state_dict` has an entry
for each module and so distinguishes the two. A GPT of this package adds its activation there, which survives nanoGPT's
train.py.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gptfast.checkpoint.vocab_padding import EMBEDDING, HEAD
from gptfast.config import Activation, GPTConfig
from kernels.pytorch_internals import COMPILED_PREFIX, state_dict_metadata

_METADATA_KEY = "gptfast.activation"
# causal masks: buffers of nanoGPT where PyTorch has no attention kernel, and of old files of transformers
MASKS = (".attn.bias", ".attn.masked_bias")
_REQUIRED_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
_MODEL_ARGS = (*_REQUIRED_ARGS, "bias", "dropout")
_OVERRIDES = ("dropout", "pad_vocab_size_to", "activation", "vocab_size")


def read(path: str | Path, override_args: Mapping[str, Any] | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read the model of a checkpoint of nanoGPT's train.py.

    NOTE: the file is a pickle. `torch.load(weights_only=True)` reads tensors and plain values and runs no code.

    Args:
        path: the file, such as out/ckpt.pt.
        override_args: values for "dropout", "pad_vocab_size_to", "activation", and "vocab_size", which drops the last
            rows of the embedding: nanoGPT pads GPT-2's 50,257 tokens to 50,304.

    Returns:
        The model's shape and its weights under this package's names. Shapes are not checked.

    Raises:
        ValueError: a file that is missing, damaged or no checkpoint of nanoGPT, or an override out of range.
    """
    overrides = dict(override_args or {})
    if not set(overrides) <= set(_OVERRIDES):
        raise ValueError(f"override_args has {', '.join(overrides)}; accepted: {', '.join(_OVERRIDES)}")
    path = Path(path).expanduser()
    model_args, saved = _load(path)
    weights = {n.removeprefix(COMPILED_PREFIX): tensor for n, tensor in saved.items() if not n.endswith(MASKS)}
    head, embedding = weights.get(HEAD), weights.get(EMBEDDING)
    tied = head is None or embedding is None or torch.equal(head, embedding)
    try:
        saved_config = GPTConfig(**model_args, activation=activation_of(saved) or "gelu", tie_weights=tied)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of nanoGPT: {error}") from error
    config = dataclasses.replace(saved_config, **overrides)
    if config.vocab_size > saved_config.vocab_size:
        raise ValueError(f"vocab_size must be at most the {saved_config.vocab_size} of {path}, got {config.vocab_size}")
    for name in {HEAD, EMBEDDING} & set(weights):
        if weights[name].shape[:1] == (saved_config.vocab_size,):
            weights[name] = weights[name][: config.vocab_size]
    return config, weights


def _load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Load `model_args` and `model` from a file."""
    if not path.is_file():
        raise ValueError(f"no checkpoint of nanoGPT at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that are no checkpoints
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many types, and some messages advise to run the file's code
        problem = f"{path} is damaged, or holds more than tensors and plain values"
        raise ValueError(f"{problem}; accepted: ckpt.pt") from error
    model_args, weights = map(content.get, ("model_args", "model")) if isinstance(content, dict) else (None, None)
    if not isinstance(model_args, dict) or not isinstance(weights, dict):
        raise ValueError(f"{path} is no checkpoint of nanoGPT: it needs a dict with model and model_args")
    unknown = [name for name in model_args if name not in _MODEL_ARGS]
    missing = [name for name in _REQUIRED_ARGS if name not in model_args]
    if unknown or missing:
        what = f"unknown {unknown[0]!r}" if unknown else f"no {missing[0]}"
        raise ValueError(f"{path} is no checkpoint of nanoGPT: {what} in its model_args")
    if not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise ValueError(f"{path} is no checkpoint of nanoGPT: its model has values that are no tensors")
    return model_args, weights


def activation_of(state_dict: Mapping[str, Any]) -> Activation | None:
    """Read the activation from the metadata of a `state_dict`; None where it is not known."""
    metadata = state_dict_metadata(state_dict)
    for entry in metadata.values():
        if entry.get(_METADATA_KEY) in get_args(Activation):
            return entry[_METADATA_KEY]
    modules = [name.removeprefix(COMPILED_PREFIX) for name in metadata]
    if "transformer.h.0.mlp.gelu" in modules:
        return "gelu"
    # nanoGPT's attention has had this module from the beginning
    return "gelu_tanh" if "transformer.h.0.attn.attn_dropout" in modules else None


def keep_activation_in_state_dict(model: nn.Module) -> None:
    """Make a GPT's `state_dict` carry its activation, and its `load_state_dict` adopt the one that weights carry.

    Only a model of the default activation adopts another, with a warning. nanoGPT's scripts do not set it, and compute
    the logits of a checkpoint of nanoGPT this way.
    """
    model.register_state_dict_post_hook(_write_activation)
    model.register_load_state_dict_pre_hook(_adopt_activation)


def _write_activation(model: Any, state_dict: object, prefix: str, metadata: dict[str, Any]) -> None:
    metadata[_METADATA_KEY] = model.config.activation


def _adopt_activation(model: Any, state_dict: Mapping[str, Any], *_: object) -> None:
    trained, own = activation_of(state_dict), model.config.activation
    if trained is not None and trained != own and own == GPTConfig.activation:
        warnings.warn(
            f"the weights were trained with activation={trained!r}, the model's {own!r} is replaced by it", stacklevel=2
        )
        model.config = dataclasses.replace(model.config, activation=trained)
        for block in model.transformer.h:
            block.mlp.activation = trained
