import dataclasses
from pathlib import Path

import pytest
import torch

from gptfast.training import recipes, trainer

SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tinyshakespeare.txt"


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="needs Tiny Shakespeare beside the checkout")
def test_shakespeare_char_cpu_reaches_nanogpts_loss(tmp_path):
    """NanoGPT's README gives 1.88 for these settings."""
    recipe = recipes.recipe("shakespeare-char", torch.device("cpu"))
    settings = {"data": str(SHAKESPEARE), "out": str(tmp_path / "run"), "device": "cpu"}
    assert trainer.train(dataclasses.replace(recipe, **settings))["val_loss"] <= 1.90
