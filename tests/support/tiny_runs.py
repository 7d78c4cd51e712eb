"""Training runs that take a fraction of a second, and steps that fail or are interrupted."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gptfast import GPTConfig
from gptfast.training import trainer
from gptfast.training.config import TrainConfig

TEXT = "To be, or not to be, that is the question:\n" * 40


def tiny_run(folder: Path, dropout: float = 0.0, checkpoint_interval: int = 8) -> TrainConfig:
    """Config of 20 steps on `folder`/text.txt, which is written, into `folder`/run."""
    (folder / "text.txt").write_text(TEXT)
    return TrainConfig(
        model=GPTConfig(block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=dropout),
        data=str(folder / "text.txt"),
        out=str(folder / "run"),
        device="cpu",
        steps=20,
        batch_size=4,
        warmup_steps=5,
        eval_interval=8,
        eval_batches=2,
        sample_tokens=5,
        checkpoint_interval=checkpoint_interval,
        log_interval=5,
    )


def before_step(patched: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """Call `action` before step `number`, counted from 0, of any run."""
    take_step = trainer.take_step

    def patched_step(run, step, idx, targets):
        if step == number:
            action()
        return take_step(run, step, idx, targets)

    patched.setattr(trainer, "take_step", patched_step)


def raising(error: BaseException) -> Callable[[], None]:
    """An action that raises."""

    def action() -> None:
        raise error

    return action
