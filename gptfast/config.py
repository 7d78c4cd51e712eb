"""Shape of a GPT: settings, their checks, and presets."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

Activation = Literal["gelu_tanh", "gelu", "relu"]
NormPosition = Literal["pre", "post"]
Position = Literal["learned", "sinusoidal", "none"]

# field to its name in Raschka 2024, "Build a Large Language Model (From Scratch)", chapter 4
_BOOK_NAMES = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_embd": "emb_dim",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "dropout": "drop_rate",
    "qkv_bias": "qkv_bias",
}


@dataclass
class GPTConfig:
    """Shape of a GPT. The first seven fields and their defaults are nanoGPT's, so its scripts run unchanged."""

    block_size: int = 1024
    """Longest sequence, in tokens."""
    vocab_size: int = 50304
    """Number of token ids: GPT-2's 50,257 rounded up to a multiple of 64. Training sets its tokenizer's."""
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads per block; must divide n_embd."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping embeddings, attention probabilities and sublayer outputs, in [0, 1)."""
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2 has them."""
    activation: Activation = "gelu_tanh"
    """Activation of the feed-forward: GPT-2's tanh approximation of GELU, GELU by erf, or ReLU."""
    norm_position: NormPosition = "pre"
    """Layer norm before each sublayer and at the end (GPT-2), or after each residual addition (the first GPT)."""
    position: Position = "learned"
    """Position information: a learned embedding, the sinusoids of the first Transformer, or none."""
    tie_weights: bool = True
    """Share one matrix between the output head and the token embedding."""
    qkv_bias: bool | None = None
    """Biases in the query, key and value projection; None follows `bias`."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    pad_vocab_size_to: int = 1
    """Pad the token embedding in memory to a multiple of this many rows; 128 is fast for any vocabulary. Files, logits,
    samples and counts have no padding."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "pad_vocab_size_to"):
            value = getattr(self, name)
            try:
                # accepts NumPy's integers and stores Python's, which JSON can hold
                number = 0 if isinstance(value, bool) else operator.index(value)
            except TypeError:
                number = 0
            if number < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            setattr(self, name, number)
        for name in ("dropout", "init_std"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {value!r}")
            setattr(self, name, float(value))
        for name in ("bias", "tie_weights", "qkv_bias"):
            value = getattr(self, name)
            if not (isinstance(value, bool) or (name == "qkv_bias" and value is None)):
                raise ValueError(f"{name} must be True or False, got {value!r}")
        if self.n_embd % self.n_head != 0:
            raise ValueError(f"n_embd must be divisible by n_head, got n_embd={self.n_embd} and n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0.0 < self.init_std < math.inf:
            raise ValueError(f"init_std must be above 0 and finite, got {self.init_std}")
        for name, kind in {"activation": Activation, "norm_position": NormPosition, "position": Position}.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        if self.position == "sinusoidal" and self.n_embd % 2 != 0:
            raise ValueError(f"sinusoidal positions need an even n_embd, got {self.n_embd}")

    @property
    def head_size(self) -> int:
        """Width of one attention head, n_embd / n_head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding in memory."""
        return -(-self.vocab_size // self.pad_vocab_size_to) * self.pad_vocab_size_to

    @property
    def has_qkv_bias(self) -> bool:
        """True if the query, key and value projection has biases."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @classmethod
    def preset(cls, name: str, **changes) -> GPTConfig:
        """Return a preset with `changes` applied.

        Raises:
            ValueError: an unknown name, or settings that do not fit together.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; accepted: {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], **changes: Any) -> GPTConfig:
        """Convert a dictionary with the names of Raschka 2024. The head is not tied to the embedding.

        Args:
            settings: vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate and qkv_bias.
            changes: other fields, such as tie_weights=True.

        Raises:
            ValueError: a key that is missing or unknown, a value out of range, or settings that do not fit together.
        """
        if not isinstance(settings, Mapping):
            raise ValueError(f"settings must be a dictionary, got {settings!r}")
        needed = set(_BOOK_NAMES.values())
        wrong = {"unknown": settings.keys() - needed, "missing": needed - settings.keys()}
        found = [f"{what} {', '.join(sorted(map(str, keys)))}" for what, keys in wrong.items() if keys]
        if found:
            raise ValueError(f"settings: {'; '.join(found)}; accepted: {', '.join(_BOOK_NAMES.values())}")
        if settings["qkv_bias"] is None:
            raise ValueError("qkv_bias must be True or False, got None")
        given = {ours: settings[theirs] for ours, theirs in _BOOK_NAMES.items()}
        try:
            return cls(**{**given, "tie_weights": False, **changes})
        except ValueError as error:
            # name the dictionary's keys, and leave quoted values alone
            renamed = {ours: theirs for ours, theirs in _BOOK_NAMES.items() if ours not in changes}
            message = re.sub(r"'[^']*'|\w+", lambda word: renamed.get(word[0], word[0]), str(error))
            raise ValueError(message) from error


# Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2
PRESETS = {
    "gpt2": GPTConfig(vocab_size=50257),
    "gpt2-medium": GPTConfig(vocab_size=50257, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(vocab_size=50257, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600),
}
