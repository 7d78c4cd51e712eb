"""GPT-2's tensors under the names and in the shapes of `transformers`, in one safetensors file or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptfast.checkpoint.atomic_files import read_json, read_tensors, require_fit
from gptfast.config import GPTConfig

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Conv1D of transformers keeps these matrices as [in, out]
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# the causal mask, which old files hold as buffers
_MASKS = (".attn.bias", ".attn.masked_bias")
_HEAD, _EMBEDDING = "lm_head.weight", "transformer.wte.weight"


def read(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder as they are in its files, by their full names.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Raises:
        ValueError: files that are missing or damaged.
    """
    return {_full(name): tensor for name, tensor in _tensors(folder) if not name.endswith(_MASKS)}


def without_zeros(config: GPTConfig, theirs: Mapping[str, Tensor]) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The settings and tensors of a model without the biases that it lacks, for which files have zeros.

    Where they are zeros no longer, `transformers` having trained them along, they stay, and the settings have them.
    """
    lacking = {name for name in theirs if name.endswith(".bias") and not _has(config, name)}
    if any(theirs[name].any() for name in lacking):
        return dataclasses.replace(config, bias=True, qkv_bias=True), dict(theirs)
    return config, {name: tensor for name, tensor in theirs.items() if name not in lacking}


def _has(config: GPTConfig, bias: str) -> bool:
    return config.has_qkv_bias if bias.endswith("attn.c_attn.bias") else config.bias


def fitted(
    folder: Path, config: GPTConfig, theirs: dict[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """The tensors that were read from a folder, by this package's names and in its shapes.

    Args:
        folder: for messages.
        config: of the model.
        theirs: by their full names.
        shapes: of the model's tensors, by name.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape or of a dtype that is no float, or a head and an
            embedding that differ where the config has them as one; the message names the first.
    """
    if config.tie_weights:
        _tie(theirs, folder)
    expected = {name: tuple(reversed(shape)) if _is_transposed(name) else shape for name, shape in shapes.items()}
    require_fit(f"{folder} does not fit its config.json", theirs, expected)
    return {name: tensor.t() if _is_transposed(name) else tensor for name, tensor in theirs.items()}


def written(config: GPTConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as `transformers` names and shapes them, on the CPU; biases that it lacks are zeros.

    Args:
        config: of the model.
        state: its `state_dict`.
    """
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == _HEAD and config.tie_weights:
            continue
        tensor = tensor.detach().cpu()
        theirs[name] = (tensor.t() if _is_transposed(name) else tensor).contiguous()
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and name.endswith(".weight"):
            bias = name.removesuffix("weight") + "bias"
            if bias not in state:
                theirs[bias] = tensor.new_zeros(tensor.shape[0])
    return theirs


def _tie(tensors: dict[str, Tensor], folder: Path) -> None:
    """Give head and embedding the one tensor that files may have under either name, or both."""
    found = [tensors[name] for name in (_EMBEDDING, _HEAD) if name in tensors]
    # transformers has dropped one of them or kept both, by its version
    if len(found) == 2 and not torch.equal(*found):
        raise ValueError(
            f"{folder} does not fit its config.json, which has tie_word_embeddings=true: {_HEAD} and {_EMBEDDING} are "
            "different; tie_word_embeddings=false keeps both"
        )
    tensors.update(dict.fromkeys((_EMBEDDING, _HEAD), found[0]) if found else {})


def _full(name: str) -> str:
    """With the prefix that files of the bare transformer lack."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _is_transposed(name: str) -> bool:
    return name.endswith(_TRANSPOSED)


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    if (folder / FILE).is_file():
        yield from read_tensors(folder / FILE).items()
    elif (folder / INDEX).is_file():
        yield from _sharded(folder)
    else:
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        only = f", only {pickles[0]}, a pickle, which can run any code and is not read" if pickles else ""
        raise ValueError(f"{folder} has no {FILE}{only}; weights are read from safetensors")


def _sharded(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the files that an index names."""
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map from tensors to files")
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} is damaged: {file!r} is no name of a file beside it")
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}, which {INDEX} names")
    for file in sorted(set(places.values())):
        tensors = read_tensors(folder / file)
        for name, place in places.items():
            if place == file:
                if name not in tensors:
                    raise ValueError(f"{folder / file} lacks tensor {name}, which {INDEX} places there")
                yield name, tensors[name]
