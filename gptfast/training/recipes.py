"""Training runs that have names."""

from __future__ import annotations

import torch

from gptfast.config import GPTConfig
from gptfast.training.settings import TrainConfig

# the two character models of nanoGPT's README
_CHAR_GPU = TrainConfig(
    model=GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False, activation="gelu"),
    data="shakespeare",
    steps=5000,
    batch_size=64,
)
_CHAR_CPU = TrainConfig(
    model=GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False, activation="gelu"),
    data="shakespeare",
    steps=2000,
    batch_size=12,
)

RECIPES = {
    "shakespeare-char-gpu": _CHAR_GPU,
    "shakespeare-char-cpu": _CHAR_CPU,
    "gpt2": TrainConfig(
        model=GPTConfig.preset("gpt2", pad_vocab_size_to=128),
        tokenizer="gpt2",
        steps=600_000,
        batch_size=12,
        learning_rate=6e-4,
        min_learning_rate=6e-5,
        warmup_steps=2000,
        beta2=0.95,
        eval_interval=1000,
        checkpoint_interval=1000,
    ),
}


def names() -> list[str]:
    """What `recipe` accepts."""
    return ["shakespeare-char", *RECIPES]


def recipe(name: str, device: torch.device) -> TrainConfig:
    """The settings of a named run. "shakespeare-char" is the size that trains in minutes on `device`.

    Raises:
        ValueError: an unknown name.
    """
    if name == "shakespeare-char":
        name = "shakespeare-char-cpu" if device.type == "cpu" else "shakespeare-char-gpu"
    if name not in RECIPES:
        raise ValueError(f"unknown preset {name!r}; accepted: {', '.join(names())}")
    return RECIPES[name]
