"""All tensors of a training run, to and from checkpoints, as full tensors even where FSDP shards them."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import lora, optim
from gptfast.checkpoint import vocab_padding
from gptfast.checkpoint.manager import Checkpoint
from gptfast.distributed import distribute_like, full_tensor, is_dtensor
from gptfast.model import GPT
from gptfast.training.train_step import TrainStep

_STEP = "step/"  # prefix of the tensors of `TrainStep.state_dict`


class TrainState:
    """A model and the step that trains it.

    With sharded parameters the methods are collective: every rank must call them.

    Args:
        model: not wrapped, except by FSDP, which works in place.
        step: trains `model` or a wrapper of it.
    """

    def __init__(self, model: GPT, step: TrainStep) -> None:
        self.model, self.step = model, step
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    @property
    def is_sharded(self) -> bool:
        """True if each rank holds shards of the parameters."""
        return any(map(is_dtensor, self._names))

    def checkpoint(self, steps: int, state: dict) -> Checkpoint:
        """Copy all tensors to the host, without vocabulary padding."""
        weights = {name: _copy(self._full(name, parameter)) for parameter, name in self._names.items()}
        optimizer = {
            name: _copy(self._full(name.rpartition("/")[0], tensor))
            for name, tensor in optim.state_dict(self.step.optimizers, self._names).items()
        }
        optimizer |= {_STEP + name: _copy(tensor) for name, tensor in self.step.state_dict().items()}
        return Checkpoint(steps, weights, optimizer, state)

    def _full(self, name: str, tensor: Tensor) -> Tensor:
        return vocab_padding.unpad(self.model.config, name, full_tensor(tensor.detach()))

    @staticmethod
    @torch.no_grad()
    def load_weights(model: GPT, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint's parameters into a model before it is wrapped.

        Raises:
            ValueError: the checkpoint belongs to another model.
        """
        own = dict(model.named_parameters())
        saved = {name: vocab_padding.pad(model.config, name, tensor) for name, tensor in checkpoint.model.items()}
        wrong = sorted(set(own) ^ set(saved)) or [name for name in own if own[name].shape != saved[name].shape]
        if wrong:
            raise ValueError(
                f"the checkpoint of step {checkpoint.step} does not fit config.json: parameter {wrong[0]} is missing, "
                "unknown or of another shape"
            )
        for name, parameter in own.items():
            parameter.copy_(saved[name])

    def load_optimizers(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint's state of the optimizers and the step.

        Raises:
            ValueError: the state does not fit the optimizers.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        optimizer, step = {}, {}
        for name, tensor in checkpoint.optimizer.items():
            parameter = name.rpartition("/")[0]
            if name.startswith(_STEP):
                step[name.removeprefix(_STEP)] = tensor
            elif parameter in parameters:
                tensor = vocab_padding.pad(self.model.config, parameter, tensor)
                optimizer[name] = distribute_like(tensor, parameters[parameter])
        optim.load_state_dict(self.step.optimizers, self._names, optimizer)
        self.step.load_state_dict(step)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Copy the tensors of a run's files to the host: weights that any GPT loads, and adapters if there are any."""
        if lora.is_applied(self.model):
            weights = lora.merged_state_dict(self.model)
            if self.model.config.tie_weights:
                del weights["lm_head.weight"]
            files = {"model.safetensors": weights, "adapters.safetensors": lora.adapters(self.model)}
        else:
            weights = {name: self._full(name, parameter) for parameter, name in self._names.items()}
            files = {"model.safetensors": weights}
        return {file: {name: _copy(tensor) for name, tensor in tensors.items()} for file, tensors in files.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
