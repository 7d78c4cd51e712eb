"""Evaluation during training: losses on fixed sequences of both splits, and a text sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptfast import devices, tokenizers
from gptfast.data.batches import Split
from gptfast.distributed import World
from gptfast.evaluation import metrics
from gptfast.generation.detokenizer import TextStream
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer
from gptfast.training.config import TrainConfig
from gptfast.training.dataset import Dataset


@dataclass(frozen=True)
class EvalSet:
    """Sequences evenly spaced over a split, the same at every evaluation.

    Args:
        split: the split they are cut from.
        batches: maximum number of batches.
        batch_size: sequences per batch, summed over all processes.
    """

    split: Split
    batches: int
    batch_size: int

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        return self.split.eval_batches(self.batches, self.batch_size)

    def bytes_per_token(self, tokenizer: Tokenizer) -> float | None:
        """Average bytes of text per target; None if the tokenizer is lossy or the text is empty."""
        targets = np.concatenate([targets.numpy().reshape(-1) for _, targets in self._batches()])
        size = tokenizers.text_bytes(tokenizer, targets)
        return size / len(targets) if size else None

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, dtype: torch.dtype, world: World) -> float:
        """Mean loss in nats per token. Collective: every rank must call it.

        Args:
            model: `model(idx, targets)` returns (anything, mean loss). Its training mode is restored.
            dtype: dtype of matrix products.
            world: the processes, each of which takes every `world.size`-th row of a batch.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of sequences
        for idx, targets in self._batches():
            mine = slice(world.rank, None, world.size)
            # a rank without a row computes one all the same: FSDP's all-gathers need every rank
            rows = len(idx[mine])
            idx, targets = (idx[mine], targets[mine]) if rows else (idx[:1], targets[:1])
            with devices.autocast(device, dtype):
                _, loss = model(idx.to(device), targets.to(device))
            total += torch.tensor([float(loss) * rows, rows], dtype=torch.float64)
        model.train(was_training)
        losses, sequences = world.sum(total).tolist()
        return losses / sequences


class Evaluator:
    """Measures a model on both splits of a dataset, with matrix products in `dtype`."""

    def __init__(self, config: TrainConfig, dataset: Dataset, dtype: torch.dtype, world: World) -> None:
        self._config, self._dataset, self._dtype, self._world = config, dataset, dtype, world
        self._val, self._train = (
            EvalSet(split, config.eval_batches, config.batch_size) for split in (dataset.val, dataset.train)
        )
        self._bytes_per_token = self._val.bytes_per_token(dataset.tokenizer)

    def metrics(self, model: GPT) -> dict[str, Any]:
        """Measure losses in nats per token, perplexity and bits per byte. Collective: every rank must call it.

        Perplexity is None beyond float64's range, bits per byte is None with a lossy tokenizer.
        """
        val_loss = self._val.mean_loss(model, self._dtype, self._world)
        train_loss = val_loss
        if self._dataset.has_held_out:
            train_loss = self._train.mean_loss(model, self._dtype, self._world)
        perplexity, ratio = metrics.perplexity(val_loss), self._bytes_per_token
        return {
            "val_loss": val_loss,
            "train_loss": train_loss,
            "val_perplexity": perplexity if math.isfinite(perplexity) else None,
            "val_bits_per_byte": None if ratio is None else metrics.bits_per_byte(val_loss, ratio),
        }

    def sample(self, model: GPT) -> str | None:
        """Continue the prompt, with the same random numbers every time; None if no sample is wanted.

        Collective with FSDP: every rank must call it.
        """
        config, tokenizer = self._config, self._dataset.tokenizer
        if not config.sample_tokens:
            return None
        prompt = config.sample_prompt
        ids = tokenizer.encode(prompt) if prompt else self._document_end()
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(config.seed)
        idx = torch.from_numpy(ids.astype(np.int64))[None].to(device)  # [1, T]
        with devices.autocast(device, self._dtype):
            tokens = model.generate(idx, config.sample_tokens, 0.8, None, generator)
        stream = TextStream(tokenizer, after=int(ids[-1]) if prompt else None)  # after a word comes a space
        pieces = [stream.push(token) for token in tokens[0, len(ids) :].tolist()]
        return prompt + "".join(pieces) + stream.flush()

    def _document_end(self) -> np.ndarray:
        """Token ids [1] after which a new document or line starts."""
        tokenizer = self._dataset.tokenizer
        if tokenizer.end_of_text is not None:
            return np.array([tokenizer.end_of_text])
        try:
            return tokenizer.encode("\n")
        except ValueError:  # a text without line ends
            return self._dataset.train.tokens.windows(np.zeros(1, dtype=np.int64), 1)[0]
