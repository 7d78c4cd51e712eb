"""Cost of checkpoints in a training run of GPT-2."""

from __future__ import annotations

import time

import pytest
import torch

from gptfast import GPT, TrainStep, devices
from gptfast.checkpoint.manager import CheckpointManager
from gptfast.training import recipes
from gptfast.training.train_state import TrainState
from tests.support.oracle import DEVICE


@pytest.mark.slow
def test_checkpoints_of_gpt2_take_less_than_two_percent_of_training(tmp_path):
    """Training waits only for copies in memory; the writes may take the whole interval."""
    recipe = recipes.RECIPES["gpt2"]
    model = GPT(recipe.model).to(DEVICE)
    step = TrainStep(model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE.type))
    # a small part of a batch on a CPU, for speed: the limit is then far stricter than the claim
    shape = (recipe.batch_size, recipe.model.block_size) if DEVICE.type == "cuda" else (1, 64)
    idx = torch.zeros(shape, dtype=torch.int64, device=DEVICE)
    for _ in range(4):
        started = time.perf_counter()
        assert step(idx, idx).loss > 0
        seconds = time.perf_counter() - started
    trained = TrainState(model, step)
    devices.keep_freed_memory()  # as in a run
    checkpoints = CheckpointManager(tmp_path, keep=1)
    checkpoints.save(trained.checkpoint(0, {}))
    checkpoints.close()
    checkpoints = CheckpointManager(tmp_path, keep=1)
    started = time.perf_counter()
    best = trained.files()
    checkpoints.save(trained.checkpoint(1, {}))
    waited = time.perf_counter() - started
    checkpoints.close()
    written = time.perf_counter() - started
    interval = seconds * recipe.checkpoint_interval
    print(f"step {seconds:.3f} s, waited {waited:.2f} s, written after {written:.2f} s")
    assert waited < 0.02 * interval
    assert written < interval
    files = {file.name: file.stat().st_size for file in (tmp_path / "step-00000001").iterdir()}
    size = 4 * model.get_num_params(non_embedding=False)
    assert files["model.safetensors"] == pytest.approx(size, rel=0.01)
    assert files["optimizer.safetensors"] == pytest.approx(2 * size, rel=0.01)
    assert best["model.safetensors"].keys() == dict(model.named_parameters()).keys()
