"""Presets of `gptfast train`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from gptfast.config import GPTConfig
from gptfast.training.config import TrainConfig

# Adam (Kingma and Ba 2014, arXiv:1412.6980) is AdamW without decay; the texts are too short to hold a part out
_ADAM_ON_SENTENCES = TrainConfig(
    held_out=0.0,
    learning_rate=1e-3,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    beta2=0.999,
    grad_clip=0.0,
    steps=100,
    eval_interval=50,
    sample_tokens=16,
    checkpoint_interval=0,
)

_POST_NORM: dict[str, Any] = {
    "n_layer": 2,
    "n_embd": 128,
    "activation": "relu",
    "norm_position": "post",
    "tie_weights": False,
}

# two sentences, 33 tokens of GPT-2: one window of 32 tokens and their successors, so a step is an epoch
_SIMPLE_GPT = dataclasses.replace(
    _ADAM_ON_SENTENCES,
    model=GPTConfig(block_size=32, n_head=4, pad_vocab_size_to=128, **_POST_NORM),
    data="chatbot",
    tokenizer="gpt2",
    batch_size=1,
    sample_prompt="Hello,",
)

# three sentences, 33 words and marks: 23 windows of 10 words and their successors, so a step is an epoch
_WORD_GPT = dataclasses.replace(
    _ADAM_ON_SENTENCES,
    model=GPTConfig(block_size=10, n_head=8, dropout=0.1, position="sinusoidal", **_POST_NORM),
    data="sentences",
    tokenizer="word",
    batch_size=23,
    sample_prompt="The quick brown",
)

# Raschka 2024, "Build a Large Language Model (From Scratch)", chapter 4
GPT_CONFIG_124M = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def _character_model(steps: int, batch_size: int, **shape: Any) -> TrainConfig:
    """Configure a character model of nanoGPT's README."""
    model = GPTConfig(bias=False, activation="gelu", **shape)
    return TrainConfig(model=model, data="shakespeare", steps=steps, batch_size=batch_size)


def _gpt2(model: GPTConfig, learning_rate: float, accumulation: int) -> TrainConfig:
    """Configure pretraining as nanoGPT does, with the learning rates of GPT-3 (Brown et al. 2020, table 2.1)."""
    return TrainConfig(
        model=dataclasses.replace(model, pad_vocab_size_to=128),
        tokenizer="gpt2",
        steps=600_000,
        batch_size=480,
        accumulation=accumulation,
        learning_rate=learning_rate,
        min_learning_rate=learning_rate / 10,
        warmup_steps=2000,
        beta2=0.95,
        eval_interval=1000,
        checkpoint_interval=1000,
    )


RECIPES = {
    "shakespeare-char-gpu": _character_model(5000, 64, block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
    "shakespeare-char-cpu": _character_model(2000, 12, block_size=64, n_layer=4, n_head=4, n_embd=128),
    "simple-gpt": _SIMPLE_GPT,
    "word-gpt": _WORD_GPT,
    "gpt2-124m": _gpt2(GPTConfig.from_dict(GPT_CONFIG_124M), 6e-4, accumulation=40),
    "gpt2": _gpt2(GPTConfig.preset("gpt2"), 6e-4, accumulation=40),
    "gpt2-medium": _gpt2(GPTConfig.preset("gpt2-medium"), 3e-4, accumulation=80),
    "gpt2-large": _gpt2(GPTConfig.preset("gpt2-large"), 2.5e-4, accumulation=120),
    "gpt2-xl": _gpt2(GPTConfig.preset("gpt2-xl"), 2e-4, accumulation=160),
}


def names() -> list[str]:
    """List the names that `recipe` accepts."""
    return ["shakespeare-char", *RECIPES]


def recipe(name: str, device: torch.device) -> TrainConfig:
    """Return the config of a preset; "shakespeare-char" chooses the size that trains in minutes on the device.

    Raises:
        ValueError: an unknown name.
    """
    if name == "shakespeare-char":
        name = "shakespeare-char-cpu" if device.type == "cpu" else "shakespeare-char-gpu"
    if name not in RECIPES:
        raise ValueError(f"unknown preset {name!r}; accepted: {', '.join(names())}")
    return RECIPES[name]
