"""GPT-2's `config.json` in `transformers`, read into and written from a `GPTConfig`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptfast.checkpoint.atomic_files import read_json
from gptfast.config import GPTConfig

_FROM_THEIR_ACTIVATION = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_TO_THEIR_ACTIVATION = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}
# fields that change the arithmetic, with the value that this GPT computes; all others (dropout, the heads of
# classifiers, special tokens of generation) do not change the logits
_FIXED: dict[str, Any] = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
}
_OWN_NAMES = {
    "vocab_size": "vocab_size",
    "n_positions": "block_size",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_weights",
}
# fields of this package: they mark biases that are zeros in the file because the model has none
_BIAS_FIELDS = ("bias", "qkv_bias")
_REQUIRED = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
# other names that transformers accepts for the same fields
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_config(path: Path) -> GPTConfig:
    """Read the model's shape from a `config.json`; dropout is 0.

    Raises:
        ValueError: a damaged file, another architecture, or a field with a value that this GPT does not compute.
    """
    theirs = {_ALIASES.get(name, name): value for name, value in read_json(path).items()}
    if theirs.get("model_type") != "gpt2":
        raise ValueError(f"{path} has model_type={theirs.get('model_type')!r}; accepted: 'gpt2'")
    missing = [name for name in _REQUIRED if name not in theirs]
    if missing:
        raise ValueError(f"{path} is no GPT-2 config: it has no {missing[0]}")
    activation = theirs.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _FROM_THEIR_ACTIVATION:
        accepted = ", ".join(_FROM_THEIR_ACTIVATION)
        raise ValueError(f"{path} has activation_function={activation!r}; accepted: {accepted}")
    tied = theirs.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise ValueError(f"{path} has tie_word_embeddings={tied!r}; accepted: true, false")
    settings = {own: theirs[name] for name, own in _OWN_NAMES.items() if name in theirs}
    settings |= {name: theirs[name] for name in _BIAS_FIELDS if isinstance(theirs.get(name), bool)}
    try:
        config = GPTConfig(**settings, activation=_FROM_THEIR_ACTIVATION[activation])  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path} is no GPT-2 config: {error}") from error
    fixed: dict[str, tuple[Any, ...]] = {name: (value,) for name, value in _FIXED.items()}
    fixed |= {"quantization_config": (None,), "n_inner": (None, 4 * config.n_embd)}
    for name, values in fixed.items():
        if theirs.get(name, values[0]) not in values:
            raise ValueError(f"{path} has {name}={theirs[name]!r}; accepted: {', '.join(map(repr, values))}")
    return config


def to_json(config: GPTConfig, dtype: torch.dtype, end_of_text: int | None) -> dict[str, Any]:
    """Return the content of a `config.json` from which `transformers` builds a model with the same logits.

    Args:
        config: the model's shape.
        dtype: of the weights.
        end_of_text: token between documents, where there is one.

    Raises:
        ValueError: a setting that GPT-2 in `transformers` does not have.
    """
    for name, accepted in (("norm_position", "pre"), ("position", "learned")):
        if getattr(config, name) != accepted:
            raise ValueError(
                f"{name}={getattr(config, name)!r} cannot be saved in Hugging Face's layout; accepted: {accepted!r}"
            )
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{name: getattr(config, own) for name, own in _OWN_NAMES.items()},
        "n_inner": None,
        "activation_function": _TO_THEIR_ACTIVATION[config.activation],
        **({} if config.bias else {"bias": False}),
        **({} if config.has_qkv_bias == config.bias else {"qkv_bias": config.has_qkv_bias}),
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **_FIXED,
        # transformers' default is GPT-2's token, which other vocabularies lack
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "dtype": str(dtype).removeprefix("torch."),
    }
