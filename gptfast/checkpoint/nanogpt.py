"""nanoGPT's checkpoints, and the activation that weights were trained with, which nanoGPT's settings do not name.

nanoGPT's MLP computes GELU by erf, as `nn.GELU` does; before it used that module it computed the tanh approximation, as
GPT-2 and this package's default do. Which of them a `state_dict` is of can be told by the metadata that PyTorch gives
it: there is an entry for every module. A GPT of this package adds its activation there, so that its `state_dict`, saved
by nanoGPT's train.py as well, remembers it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from gptfast.backend import Request
from gptfast.checkpoint.atomic_files import require_fit
from gptfast.config import Activation, GPTConfig
from kernels.pytorch_internals import COMPILED_PREFIX, state_dict_metadata

if TYPE_CHECKING:
    from gptfast.model import GPT

_KEY = "gptfast.activation"
# causal masks, buffers of nanoGPT where PyTorch has no attention of its own
_MASKS = (".attn.bias", ".attn.masked_bias")
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout")


def load(path: str | Path, override_args: Mapping[str, Any] | None = None, backend: Request = "auto") -> GPT:
    """The model of a checkpoint that nanoGPT's train.py has written, in float32.

    The file is read with `torch.load(weights_only=True)`: tensors and plain values, nothing that runs code.

    Args:
        path: of the file, such as out/ckpt.pt.
        override_args: "dropout", "pad_vocab_size_to", "activation" where it is neither nanoGPT's nor of a GPT of this
            package, and "vocab_size" to drop the last rows of the embedding: nanoGPT pads GPT-2's 50,257 to 50,304, for
            which there is no tokenizer.
        backend: as for `GPT`.

    Raises:
        ValueError: no such file, one that is damaged or no checkpoint of nanoGPT's, or weights that do not fit its
            settings.
    """
    from gptfast.model import GPT

    overrides = dict(override_args or {})
    if not set(overrides) <= {"dropout", "pad_vocab_size_to", "activation", "vocab_size"}:
        accepted = "override_args accepts dropout, pad_vocab_size_to, activation and vocab_size"
        raise ValueError(f"{accepted}, got {', '.join(overrides)}")
    path = Path(path).expanduser()
    arguments, state = _read(path)
    weights = {
        name.removeprefix(COMPILED_PREFIX): tensor for name, tensor in state.items() if not name.endswith(_MASKS)
    }
    head, embedding = weights.get(_HEAD), weights.get(_EMBEDDING)
    tied = head is None or embedding is None or torch.equal(head, embedding)
    try:
        config = GPTConfig(**arguments, activation=activation_of(state) or "gelu", tie_weights=tied)
    except ValueError as error:
        raise ValueError(f"{path} is no checkpoint of nanoGPT's: {error}") from error
    model = GPT(dataclasses.replace(config, **overrides), backend)
    if model.config.vocab_size > config.vocab_size:
        raise ValueError(f"vocab_size must be at most the {config.vocab_size} of {path}, got {model.config.vocab_size}")
    for name in {_HEAD, _EMBEDDING} & set(weights):
        if weights[name].shape[:1] == (config.vocab_size,):
            weights[name] = weights[name][: model.config.vocab_size]
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    require_fit(f"{path} does not fit its model_args", weights, shapes)
    model.load_state_dict(weights)
    return model


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights in a checkpoint."""
    if not path.is_file():
        raise ValueError(f"no such checkpoint of nanoGPT's: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are no checkpoints
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind, by what is wrong with the file; some advise to run what it holds
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, which is not read"
        ) from error
    arguments, state = map(content.get, ("model_args", "model")) if isinstance(content, dict) else (None, None)
    if not isinstance(arguments, dict) or not isinstance(state, dict):
        raise ValueError(f"{path} is no checkpoint of nanoGPT's: it needs a dict with model and model_args")
    unknown = [name for name in arguments if name not in _MODEL_ARGS]
    missing = [name for name in _MODEL_ARGS[:5] if name not in arguments]
    if unknown or missing:
        what = f"unknown {unknown[0]!r}" if unknown else f"no {missing[0]}"
        raise ValueError(f"{path} is no checkpoint of nanoGPT's: {what} in its model_args")
    if not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{path} is no checkpoint of nanoGPT's: its model has values that are no tensors")
    return arguments, state


def activation_of(state: Mapping[str, Any]) -> Activation | None:
    """The activation that a `state_dict` was trained with, None where it does not tell."""
    metadata = state_dict_metadata(state)
    for entry in metadata.values():
        if entry.get(_KEY) in get_args(Activation):
            return entry[_KEY]
    modules = [name.removeprefix(COMPILED_PREFIX) for name in metadata]
    if "transformer.h.0.mlp.gelu" in modules:
        return "gelu"
    # of nanoGPT's attention, which has had modules of dropout from the beginning
    return "gelu_tanh" if "transformer.h.0.attn.attn_dropout" in modules else None


def remember_activation(model: GPT) -> None:
    """Have `state_dict` tell the activation, and `load_state_dict` follow what it is told.

    A model of the default activation takes over that of the weights, with a warning: scripts of nanoGPT's, whose
    settings do not name it, give a checkpoint of nanoGPT's the logits that it had there.
    """
    model.register_state_dict_post_hook(_write)
    model.register_load_state_dict_pre_hook(_follow)


def _write(model: Any, state: object, prefix: str, metadata: dict[str, Any]) -> None:
    metadata[_KEY] = model.config.activation


def _follow(model: Any, state: Mapping[str, Any], *_: object) -> None:
    trained, ours = activation_of(state), model.config.activation
    if trained is not None and trained != ours and ours == GPTConfig.activation:
        warnings.warn(
            f"the weights were trained with activation={trained!r}, which the model now has in the place of {ours!r}",
            stacklevel=2,
        )
        model.config = dataclasses.replace(model.config, activation=trained)
        for block in model.transformer.h:
            block.mlp.activation = trained
