from pathlib import Path

import pytest
import torch
import transformers

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture
def folder(tmp_path) -> Path:
    """GPT-2 with random weights, as `transformers` saves it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    path = tmp_path / "model"
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path
