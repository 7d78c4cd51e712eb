"""GPT-2's tensors under the names and in the shapes of `transformers`, in one safetensors file or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gptfast.checkpoint.atomic_files import read_json, read_tensors
from gptfast.checkpoint.nanogpt import MASKS
from gptfast.checkpoint.vocab_padding import EMBEDDING, HEAD
from gptfast.config import GPTConfig

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# transformers keeps these matrices as [in, out], in its Conv1D
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of a folder under their full names, in the shapes of `transformers`.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and the files that it names.

    Raises:
        ValueError: files that are missing or damaged.
    """
    if (folder / FILE).is_file():
        tensors: Iterator[tuple[str, Tensor]] = iter(read_tensors(folder / FILE).items())
    elif (folder / INDEX).is_file():
        tensors = _read_shards(folder)
    else:
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        only = f", only the pickle {pickles[0]}, which can run any code and is not read" if pickles else ""
        raise ValueError(f"{folder} has no {FILE}{only}; save the weights as safetensors")
    # files of the bare transformer lack the prefix
    prefixes = ("transformer.", "lm_head.")
    full = ((name if name.startswith(prefixes) else f"transformer.{name}", tensor) for name, tensor in tensors)
    return {name: tensor for name, tensor in full if not name.endswith(MASKS)}


def from_hugging_face(
    config: GPTConfig, theirs: Mapping[str, Tensor], folder: Path
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Convert tensors to this package's layout, and drop biases that the model lacks and the file has as zeros.

    If `transformers` has trained any of these since, the returned config has all biases.

    Args:
        config: the model's shape.
        theirs: tensors by their full names.
        folder: for error messages.

    Raises:
        ValueError: a head and an embedding that differ where the config ties them.
    """
    biases = {name: name.endswith("attn.c_attn.bias") for name in theirs if name.endswith(".bias")}
    absent = {name for name, is_qkv in biases.items() if not (config.has_qkv_bias if is_qkv else config.bias)}
    if any(theirs[name].any() for name in absent):
        config, absent = dataclasses.replace(config, bias=True, qkv_bias=True), set()
    weights = {
        name: tensor.t() if name.endswith(_TRANSPOSED) and tensor.dim() == 2 else tensor
        for name, tensor in theirs.items()
        if name not in absent
    }
    if config.tie_weights:
        # files have the tensor under either name or both, by the version of transformers
        tied = [weights[name] for name in (EMBEDDING, HEAD) if name in weights]
        if len(tied) == 2 and not torch.equal(*tied):
            raise ValueError(
                f"{folder} does not fit its config.json: {HEAD} and {EMBEDDING} are different with "
                "tie_word_embeddings=true; set it to false to keep both"
            )
        weights.update(dict.fromkeys((EMBEDDING, HEAD), tied[0]) if tied else {})
    return config, weights


def to_hugging_face(config: GPTConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a model's `state_dict` to the layout of `transformers`, on the CPU. Biases that it lacks become zeros."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name == HEAD and config.tie_weights:
            continue
        tensor = tensor.detach().cpu()
        theirs[name] = (tensor.t() if name.endswith(_TRANSPOSED) else tensor).contiguous()
        if name.startswith(("transformer.h.", "transformer.ln_f.")) and name.endswith(".weight"):
            bias = name.removesuffix("weight") + "bias"
            if bias not in state_dict:
                theirs[bias] = tensor.new_zeros(tensor.shape[0])
    return theirs


def _read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the files that an index names."""
    index = folder / INDEX
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map from tensors to files")
    files = sorted(set(file_of.values()))
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"{index} is damaged: {file!r} is not the name of a file beside it")
        if not (folder / file).is_file():
            raise ValueError(f"{folder} has no {file}, which {INDEX} names")
    for file in files:
        tensors = read_tensors(folder / file)
        for name in (name for name, place in file_of.items() if place == file):
            if name not in tensors:
                raise ValueError(f"{folder / file} lacks tensor {name}, which {INDEX} places there")
            yield name, tensors[name]
