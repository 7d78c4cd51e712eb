"""A training run that takes a fraction of a second."""

from pathlib import Path

from gptfast import GPTConfig
from gptfast.training.config import TrainConfig

TEXT = "To be, or not to be, that is the question:\n" * 40


def tiny_run(folder: Path, dropout: float = 0.0, checkpoint_interval: int = 8) -> TrainConfig:
    """Settings of 20 steps on `folder`/text.txt, which is written, into `folder`/run."""
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
