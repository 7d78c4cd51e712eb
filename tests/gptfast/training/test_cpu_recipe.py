import dataclasses
from pathlib import Path

import pytest
import torch

from gptfast.training import recipes, trainer

SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tinyshakespeare.txt"


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="Tiny Shakespeare is not beside this checkout")
def test_the_cpu_recipe_reaches_nanogpts_loss(tmp_path):
    """NanoGPT's README gives 1.88 for these settings."""
    recipe = recipes.recipe("shakespeare-char", torch.device("cpu"))
    assert (recipe.model.n_layer, recipe.model.n_head, recipe.model.n_embd, recipe.model.block_size) == (4, 4, 128, 64)
    assert (recipe.batch_size, recipe.steps, recipe.model.dropout) == (12, 2000, 0.0)
    settings = {"data": str(SHAKESPEARE), "out": str(tmp_path / "run"), "device": "cpu"}
    assert trainer.train(dataclasses.replace(recipe, **settings))["val_loss"] <= 1.90
