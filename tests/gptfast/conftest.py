from pathlib import Path

import pytest
import torch
import transformers

from gptfast.training import trainer
from tests.support.tiny_runs import tiny_run

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture
def folder(tmp_path) -> Path:
    """GPT-2 with random weights, as `transformers` saves it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    path = tmp_path / "model"
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """A run folder with a tiny character model."""
    config = tiny_run(tmp_path_factory.mktemp("trained"))
    trainer.train(config)
    return config.out
