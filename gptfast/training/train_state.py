"""All tensors of a model in training, to and from checkpoints, whatever processes share it and however it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast import lora, optim
from gptfast.checkpoint import vocab_padding
from gptfast.checkpoint.manager import Checkpoint
from gptfast.distributed import distribute_like, full_tensor, is_dtensor
from gptfast.model import GPT
from gptfast.training.train_step import TrainStep

_STEP = "step/"  # before the names of what the step itself carries on


class TrainState:
    """A model and the step that trains it. Where processes have parts of parameters, all have to call the methods.

    Args:
        model: not wrapped, but for FSDP.
        step: that trains it.
    """

    def __init__(self, model: GPT, step: TrainStep) -> None:
        self.model, self.step = model, step
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}

    @property
    def in_parts(self) -> bool:
        """Whether this process has parts of parameters alone."""
        return any(map(is_dtensor, self._names))

    def checkpoint(self, steps: int, state: dict) -> Checkpoint:
        """Copies of everything, without padding of the vocabulary."""
        weights = {name: _copy(self._shown(name, parameter)) for parameter, name in self._names.items()}
        moments = {
            name: _copy(self._shown(name.rpartition("/")[0], tensor))
            for name, tensor in optim.state_dict(self.step.optimizers, self._names).items()
        }
        moments |= {_STEP + name: _copy(tensor) for name, tensor in self.step.state_dict().items()}
        return Checkpoint(steps, weights, moments, state)

    def _shown(self, name: str, tensor: Tensor) -> Tensor:
        return vocab_padding.unpad(self.model.config, name, full_tensor(tensor.detach()))

    @staticmethod
    @torch.no_grad()
    def load_weights(model: GPT, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint's parameters into a model that is not wrapped yet.

        Raises:
            ValueError: they are of another model.
        """
        own = dict(model.named_parameters())
        saved = {name: vocab_padding.pad(model.config, name, tensor) for name, tensor in checkpoint.model.items()}
        wrong = sorted(set(own) ^ set(saved)) or [name for name in own if own[name].shape != saved[name].shape]
        if wrong:
            raise ValueError(
                f"the checkpoint of step {checkpoint.step} does not fit config.json: parameter {wrong[0]} is missing, "
                "unknown or misshapen"
            )
        for name, parameter in own.items():
            parameter.copy_(saved[name])

    def load_optimizers(self, checkpoint: Checkpoint) -> None:
        """Give the optimizers and the step what a checkpoint has of them.

        Raises:
            ValueError: it is of other settings.
        """
        parameters = {name: parameter for parameter, name in self._names.items()}
        moments, step = {}, {}
        for name, tensor in checkpoint.optimizer.items():
            parameter = name.rpartition("/")[0]
            if name.startswith(_STEP):
                step[name.removeprefix(_STEP)] = tensor
            elif parameter in parameters:
                tensor = vocab_padding.pad(self.model.config, parameter, tensor)
                moments[name] = distribute_like(tensor, parameters[parameter])
        optim.load_state_dict(self.step.optimizers, self._names, moments)
        self.step.load_state_dict(step)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """Copies for files: weights that any GPT loads, tied ones once, and adapters, if there are some, apart."""
        if not lora.is_applied(self.model):
            weights = {name: self._shown(name, parameter) for parameter, name in self._names.items()}
            found = {"model.safetensors": weights}
        else:
            found = {
                "model.safetensors": lora.merged_state_dict(self.model),
                "adapters.safetensors": lora.adapters(self.model),
            }
            if self.model.config.tie_weights:
                del found["model.safetensors"]["lm_head.weight"]
        return {file: {name: _copy(tensor) for name, tensor in tensors.items()} for file, tensors in found.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
