"""The `config.json` of GPT-2 in `transformers`, and the settings of a GPT that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptfast.checkpoint.atomic_files import read_json
from gptfast.config import GPTConfig

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_THEIR_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
# fields that change the arithmetic, with the value that this GPT computes; all others (dropout, the heads of
# classifiers, what generation begins and ends with) say nothing about the logits
_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
_OURS = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_weights",
}
# fields that theirs lacks, written where biases are zeros because the model has none: `weights.without_zeros`
_BIASES = ("bias", "qkv_bias")
_REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# other names that transformers takes for the same fields
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model in Hugging Face's layout, of any architecture. A run folder is none."""
    try:
        return "model_type" in read_json(folder / "config.json")
    except (OSError, ValueError):
        return False


def read(path: Path) -> GPTConfig:
    """The settings in a `config.json`, without dropout.

    Raises:
        ValueError: the file is damaged, of another architecture, or has a field with a value that this GPT does not
            compute.
    """
    saved = read_json(path)
    theirs = {_ALIASES.get(name, name): value for name, value in saved.items()}
    if theirs.get("model_type") != "gpt2":
        raise ValueError(
            f"{path} is no GPT-2 config: it has model_type={theirs.get('model_type')!r}, only 'gpt2' is read"
        )
    missing = [name for name in _REQUIRED if name not in theirs]
    if missing:
        raise ValueError(f"{path} is no GPT-2 config: it has no {missing[0]}")
    for name, needed in (*_FIXED.items(), ("quantization_config", None)):
        if theirs.get(name, needed) != needed:
            raise ValueError(f"{path} has {name}={theirs[name]!r}, only {needed!r} is supported")
    activation = theirs.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(f"{path} has activation_function={activation!r}; accepted: {', '.join(_ACTIVATIONS)}")
    tied = theirs.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise ValueError(f"{path} has tie_word_embeddings={tied!r}; accepted: true, false")
    settings = {ours: theirs[name] for name, ours in _OURS.items() if name in theirs}
    settings |= {name: theirs[name] for name in _BIASES if isinstance(theirs.get(name), bool)}
    try:
        config = GPTConfig(**settings, activation=_ACTIVATIONS[activation])  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path} is no GPT-2 config: {error}") from error
    if theirs.get("n_inner") not in (None, 4 * config.n_embd):
        raise ValueError(
            f"{path} has n_inner={theirs['n_inner']!r}, only 4 * n_embd = {4 * config.n_embd} is supported"
        )
    return config


def written(config: GPTConfig, dtype: torch.dtype, end_of_text: int | None) -> dict[str, Any]:
    """The content of `config.json`, from which `transformers` makes a model with the same logits.

    Args:
        config: the settings.
        dtype: of the weights.
        end_of_text: the token between documents, where there is one.

    Raises:
        ValueError: a setting that GPT-2's architecture does not have; the message names the field.
    """
    _require_expressible(config)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, ours) for name, ours in _OURS.items()},
        "n_inner": None,
        "activation_function": _THEIR_ACTIVATIONS[config.activation],
        **({} if config.bias else {"bias": False}),
        **({} if config.has_qkv_bias == config.bias else {"qkv_bias": config.has_qkv_bias}),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **_FIXED,
        # theirs default to GPT-2's, which other vocabularies lack
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _require_expressible(config: GPTConfig) -> None:
    for name, needed in (("norm_position", "pre"), ("position", "learned")):
        given = getattr(config, name)
        if given != needed:
            raise ValueError(
                f"{name}={given!r} cannot be saved in Hugging Face's layout: their GPT-2 has {needed!r} alone"
            )
