"""Evaluation during training: losses on fixed sequences of both splits, and a text sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

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

    def bytes_per_token(self, tokenizer: Tokenizer) -> float | None:
        """Return the average bytes of text per target; None if the tokenizer is lossy or the text is empty."""
        batches = self.split.eval_batches(self.batches, self.batch_size)
        targets = np.concatenate([targets.numpy().reshape(-1) for _, targets in batches])
        size = tokenizers.text_bytes(tokenizer, targets)
        return size / len(targets) if size else None

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, dtype: torch.dtype, world: World) -> float:
        """Compute the mean loss in nats per token. Collective: every rank must call it.

        Args:
            model: `model(idx, targets)` returns (anything, mean loss). Its training mode is restored.
            dtype: dtype of matmuls.
            world: the processes; each takes every `world.size`-th row of a batch.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # sum of losses, number of sequences
        for idx, targets in self.split.eval_batches(self.batches, self.batch_size):
            rows = len(idx[world.rank :: world.size])
            # a rank without a row of its own computes one for FSDP's all-gathers, which need every rank
            mine = slice(world.rank, None, world.size) if rows else slice(1)
            idx, targets = idx[mine], targets[mine]
            with devices.autocast(device, dtype):
                _, loss = model(idx.to(device), targets.to(device))
            total += torch.tensor([float(loss) * rows, rows], dtype=torch.float64)
        model.train(was_training)
        losses, sequences = world.sum(total).tolist()
        return losses / sequences


class Evaluator:
    """Measures a model on both splits of a dataset, with matmuls in `dtype`."""

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
        train_loss = val_loss = self._val.mean_loss(model, self._dtype, self._world)
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
        stream = TextStream(tokenizer, after=int(ids[-1]) if prompt else None)  # a space may follow the prompt
        pieces = [stream.push(token) for token in tokens[0, len(ids) :].tolist()]
        return prompt + "".join(pieces) + stream.flush()

    def _document_end(self) -> np.ndarray:
        """Return the token id [1] that precedes a new document or line."""
        tokenizer = self._dataset.tokenizer
        if tokenizer.end_of_text is not None:
            return np.array([tokenizer.end_of_text])
        try:
            return tokenizer.encode("\n")
        except ValueError:  # a text without line ends
            return self._dataset.train.tokens.windows(np.zeros(1, dtype=np.int64), 1)[0]
