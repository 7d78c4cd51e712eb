import json
import re
import types
from dataclasses import asdict, astuple

import numpy as np
import pytest

from gptfast import GPTConfig


def test_config_defaults_are_nanogpts():
    assert astuple(GPTConfig())[:7] == (1024, 50304, 12, 12, 768, 0.0, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 65, "n_head": 4}, "n_embd must be divisible by n_head, got n_embd=65 and n_head=4"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1, got 0"),
        ({"block_size": 8.5}, "block_size must be an integer of at least 1, got 8.5"),
        ({"vocab_size": None}, "vocab_size must be an integer of at least 1, got None"),
        ({"n_layer": np.True_}, r"n_layer must be an integer of at least 1, got np\.True_"),
        ({"n_head": np.float64(2.0)}, r"n_head must be an integer of at least 1, got np\.float64\(2.0\)"),
        ({"n_embd": np.array([64, 64])}, r"n_embd must be an integer of at least 1, got array\(\[64, 64\]\)"),
        ({"n_head": np.int64(-2)}, r"n_head must be an integer of at least 1, got np\.int64\(-2\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, "dropout must be a number, got '0.1'"),
        ({"init_std": 0.0}, "init_std must be above 0 and finite, got 0.0"),
        ({"init_std": float("inf")}, "init_std must be above 0 and finite, got inf"),
        ({"init_std": True}, "init_std must be a number, got True"),
        ({"bias": 1}, "bias must be True or False, got 1"),
        ({"bias": None}, "bias must be True or False, got None"),
        ({"qkv_bias": 0.0}, "qkv_bias must be True or False, got 0.0"),
        ({"activation": "swish"}, "activation must be one of gelu_tanh, gelu, relu, got 'swish'"),
        ({"norm_position": "middle"}, "norm_position must be one of pre, post, got 'middle'"),
        ({"position": "rotary"}, "position must be one of learned, sinusoidal, none, got 'rotary'"),
        ({"position": "sinusoidal", "n_embd": 9, "n_head": 3}, "sinusoidal positions need an even n_embd, got 9"),
    ],
)
def test_config_rejects_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**settings)


def test_config_stores_numpy_numbers_as_pythons():
    config = GPTConfig(vocab_size=np.int64(65), n_head=np.uint8(4), n_embd=np.int32(64), dropout=np.float32(0.5))
    assert config == GPTConfig(vocab_size=65, n_head=4, n_embd=64, dropout=0.5)
    assert json.loads(json.dumps(asdict(config)))["vocab_size"] == 65


def test_preset_takes_changes_and_rejects_unknown_names():
    expected = GPTConfig(vocab_size=50257, n_layer=48, n_head=25, n_embd=1600, dropout=0.1)
    assert GPTConfig.preset("gpt2-xl", dropout=0.1) == expected
    with pytest.raises(ValueError, match="unknown model preset 'gpt5'; accepted: gpt2, gpt2-medium"):
        GPTConfig.preset("gpt5")


@pytest.mark.parametrize(
    ("name", "n_layer", "n_embd"),
    [("gpt2", 12, 768), ("gpt2-medium", 24, 1024), ("gpt2-large", 36, 1280), ("gpt2-xl", 48, 1600)],
)
def test_preset_has_gpt2s_shape(name, n_layer, n_embd):
    config = GPTConfig.preset(name)
    assert (config.n_layer, config.n_embd, config.head_size, config.has_qkv_bias) == (n_layer, n_embd, 64, True)
    assert (config.block_size, config.vocab_size, config.bias, config.tie_weights) == (1024, 50257, True, True)
    assert (config.activation, config.norm_position, config.position) == ("gelu_tanh", "pre", "learned")


def test_has_qkv_bias_follows_bias_unless_given():
    assert GPTConfig(bias=True).has_qkv_bias
    assert not GPTConfig(bias=False).has_qkv_bias
    assert not GPTConfig(bias=True, qkv_bias=False).has_qkv_bias


BOOK = {"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.1,
        "qkv_bias": False}  # fmt: skip


def test_from_dict_takes_the_books_names():
    """The model has an untied head, and no biases for queries, keys and values."""
    config = GPTConfig.from_dict(BOOK)
    assert config == GPTConfig(
        block_size=1024, vocab_size=50257, n_layer=12, n_head=12, n_embd=768, dropout=0.1, qkv_bias=False,
        tie_weights=False,
    )  # fmt: skip
    tied = GPTConfig.from_dict(types.MappingProxyType(BOOK), tie_weights=True, pad_vocab_size_to=128, n_layer=2)
    assert (tied.tie_weights, tied.padded_vocab_size, tied.n_layer) == (True, 50304, 2)
    other = {"vocab_size": 5, "context_length": 6, "emb_dim": 8, "n_heads": 4, "n_layers": 3, "drop_rate": 0.0}
    assert GPTConfig.from_dict({**other, "qkv_bias": True}) == GPTConfig(
        vocab_size=5, block_size=6, n_embd=8, n_head=4, n_layer=3, dropout=0.0, qkv_bias=True, tie_weights=False
    )


ACCEPTED = "accepted: vocab_size, context_length, emb_dim, n_heads, n_layers, drop_rate, qkv_bias"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 12, 7: 1}, f"settings: unknown 7, n_head; {ACCEPTED}"),
        ({"context_length": "1024"}, "context_length must be an integer of at least 1, got '1024'"),
        ({"n_layers": 0}, "n_layers must be an integer of at least 1, got 0"),
        ({"n_heads": 12.0}, "n_heads must be an integer of at least 1, got 12.0"),
        ({"emb_dim": 100}, "emb_dim must be divisible by n_heads, got emb_dim=100 and n_heads=12"),
        ({"drop_rate": "n_head"}, "drop_rate must be a number, got 'n_head'"),
        ({"drop_rate": 1}, "drop_rate must be in [0, 1), got 1.0"),
        ({"qkv_bias": "no"}, "qkv_bias must be True or False, got 'no'"),
        ({"qkv_bias": None}, "qkv_bias must be True or False, got None"),
    ],
)
def test_from_dict_names_the_dictionarys_keys_in_errors(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        GPTConfig.from_dict({**BOOK, **changes})


def test_from_dict_rejects_missing_and_unknown_keys():
    less = {name: value for name, value in BOOK.items() if name not in ("drop_rate", "emb_dim")}
    with pytest.raises(ValueError, match=f"^settings: missing drop_rate, emb_dim; {ACCEPTED}$"):
        GPTConfig.from_dict(less)
    with pytest.raises(ValueError, match=f"^settings: unknown width; missing drop_rate, emb_dim; {ACCEPTED}$"):
        GPTConfig.from_dict({**less, "width": 768})
    with pytest.raises(ValueError, match=r"^settings must be a dictionary, got \['gpt2'\]$"):
        GPTConfig.from_dict(["gpt2"])
    with pytest.raises(ValueError, match=r"^emb_dim must be divisible by n_head, got emb_dim=768 and n_head=5$"):
        GPTConfig.from_dict(BOOK, n_head=5)
