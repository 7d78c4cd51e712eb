"""Sequences of a split that a run evaluates again and again, by all its processes together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gptfast import devices, tokenizers
from gptfast.data.batches import Split
from gptfast.distributed import World
from gptfast.tokenizers import Tokenizer


@dataclass(frozen=True)
class Sequences:
    """Sequences spread evenly over a split, the same at each evaluation.

    Args:
        split: that they are of.
        batches: at most so many of them.
        batch_size: sequences of a batch, of all processes.
    """

    split: Split
    batches: int
    batch_size: int

    def bytes_per_token(self, tokenizer: Tokenizer) -> float | None:
        """Bytes of text for each token that is predicted; None where tokens do not keep the text, or are none."""
        targets = [targets.numpy().reshape(-1) for _, targets in self._all()]
        size = tokenizers.text_bytes(tokenizer, np.concatenate(targets))
        return None if not size else size / sum(len(part) for part in targets)

    def _all(self):
        return self.split.eval_batches(self.batches, self.batch_size)

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, dtype: torch.dtype, world: World) -> float:
        """The mean loss in nats per token, each process taking its rows of the batches.

        Args:
            model: as `gptfast.TrainStep` takes it, left in the mode it was in.
            dtype: of matrix products.
            world: the processes, all of which have to call.
        """
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # the sum of losses, and sequences
        for idx, targets in self._all():
            mine = slice(world.rank, None, world.size)
            # a smaller batch may have no row for some, and yet they have to go through a model that is in parts
            rows = len(idx[mine])
            idx, targets = (idx[mine], targets[mine]) if rows else (idx[:1], targets[:1])
            with devices.autocast(device, dtype):
                _, loss = model(idx.to(device), targets.to(device))
            total += torch.tensor([float(loss) * rows, rows], dtype=torch.float64)
        model.train(was_training)
        losses, sequences = world.sum(total).tolist()
        return losses / sequences
