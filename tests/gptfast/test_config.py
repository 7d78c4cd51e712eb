import json
from dataclasses import asdict

import numpy as np
import pytest

from gptfast import GPTConfig


def test_defaults_are_nanogpts():
    config = GPTConfig()
    assert (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd) == (
        1024,
        50304,
        12,
        12,
        768,
    )
    assert (config.dropout, config.bias) == (0.0, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_embd": 65, "n_head": 4}, "n_embd must be divisible by n_head, got n_embd=65 and n_head=4"),
        ({"n_layer": 0}, "n_layer must be an integer of at least 1, got 0"),
        ({"block_size": 8.5}, "block_size must be an integer of at least 1, got 8.5"),
        ({"vocab_size": None}, "vocab_size must be an integer of at least 1, got None"),
        ({"n_layer": True}, "n_layer must be an integer of at least 1, got True"),
        ({"n_layer": np.True_}, r"n_layer must be an integer of at least 1, got np\.True_"),
        ({"n_head": np.float64(2.0)}, r"n_head must be an integer of at least 1, got np\.float64\(2.0\)"),
        ({"n_embd": np.array([64, 64])}, r"n_embd must be an integer of at least 1, got array\(\[64, 64\]\)"),
        ({"n_head": np.int64(-2)}, r"n_head must be an integer of at least 1, got np\.int64\(-2\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, "dropout must be a number, got '0.1'"),
        ({"dropout": None}, "dropout must be a number, got None"),
        ({"init_std": 0.0}, "init_std must be above 0 and finite, got 0.0"),
        ({"init_std": float("inf")}, "init_std must be above 0 and finite, got inf"),
        ({"init_std": float("nan")}, "init_std must be above 0 and finite, got nan"),
        ({"init_std": True}, "init_std must be a number, got True"),
        ({"activation": "swish"}, "activation must be one of gelu_tanh, gelu, relu, got 'swish'"),
        ({"norm_position": "middle"}, "norm_position must be one of pre, post, got 'middle'"),
        ({"position": "rotary"}, "position must be one of learned, sinusoidal, none, got 'rotary'"),
        ({"position": "sinusoidal", "n_embd": 9, "n_head": 3}, "sinusoidal positions need an even n_embd, got 9"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**settings)


def test_numbers_of_numpy_are_stored_as_pythons():
    config = GPTConfig(vocab_size=np.int64(65), n_head=np.uint8(4), n_embd=np.int32(64), dropout=np.float32(0.5))
    assert config == GPTConfig(vocab_size=65, n_head=4, n_embd=64, dropout=0.5)
    assert json.loads(json.dumps(asdict(config)))["vocab_size"] == 65


def test_presets():
    assert GPTConfig.preset("gpt2-xl", dropout=0.1) == GPTConfig(
        vocab_size=50257, n_layer=48, n_head=25, n_embd=1600, dropout=0.1
    )
    with pytest.raises(ValueError, match="unknown model preset 'gpt5'; accepted: gpt2, gpt2-medium"):
        GPTConfig.preset("gpt5")


def test_qkv_bias_follows_bias_unless_given():
    assert GPTConfig(bias=True).has_qkv_bias
    assert not GPTConfig(bias=False).has_qkv_bias
    assert not GPTConfig(bias=True, qkv_bias=False).has_qkv_bias
