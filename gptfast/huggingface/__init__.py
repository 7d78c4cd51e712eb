"""Models and tokenizers in the files that Hugging Face's libraries read and write.

    config, state_dict = huggingface.read("openai-community/gpt2")
    huggingface.save("folder", config, state_dict, tokenizer)

`GPT.from_pretrained` and `GPT.save_pretrained` do the same for a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptfast.checkpoint.atomic_files import new_folder, write_json, write_tensors
from gptfast.checkpoint.vocab_padding import HEAD
from gptfast.config import GPTConfig
from gptfast.huggingface import config as configs
from gptfast.huggingface import hub, tokenizer, weights
from gptfast.tokenizers import Tokenizer

_OVERRIDES = ("dropout", "pad_vocab_size_to")
_GPT2_VOCAB_SIZE, _GPT2_END_OF_TEXT = 50257, 50256


def read(name: str | Path, override_args: Mapping[str, Any] | None = None) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read a model in Hugging Face's layout.

    Args:
        name: a folder with `config.json` and `model.safetensors` (or several such files and their index), a repository
            OWNER/MODEL on the hub, or gpt2, gpt2-medium, gpt2-large or gpt2-xl. A folder is preferred to the hub, from
            which files are downloaded once.
        override_args: values for "dropout", which is 0 otherwise, and "pad_vocab_size_to".

    Returns:
        The model's shape and its weights under this package's names and in its layout. Shapes are not checked.

    Raises:
        ValueError: an unknown name, files that are missing, damaged or do not fit each other, an architecture other
            than GPT-2's, an override out of range, or a hub that cannot be reached.
    """
    overrides = dict(override_args or {})
    if not set(overrides) <= set(_OVERRIDES):
        raise ValueError(f"override_args has {', '.join(overrides)}; accepted: {', '.join(_OVERRIDES)}")
    folder = hub.locate(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a folder with config.json and {weights.FILE}")
    config = dataclasses.replace(configs.read_config(folder / "config.json"), **overrides)
    return weights.from_hugging_face(config, weights.read_weights(folder), folder)


def save(
    folder: str | Path, config: GPTConfig, state_dict: Mapping[str, Tensor], tokens: Tokenizer | None = None
) -> None:
    """Write a folder from which `transformers.AutoModelForCausalLM` loads a model with the same logits.

    It has `config.json` and `model.safetensors`. With a tokenizer it also has `tokenizer.json` and
    `tokenizer_config.json`, from which `transformers.AutoTokenizer` loads one with the same tokens, and a file from
    which this package reads it back. The folder appears whole or not at all.

    Args:
        folder: a path that does not exist yet, or an empty folder.
        config: the model's shape.
        state_dict: its weights without padding and adapters, written in their dtype; missing biases become zeros.
        tokens: the model's tokenizer.

    Raises:
        ValueError: a setting that GPT-2 in `transformers` does not have, a tokenizer that its format cannot hold, or a
            folder that is not empty.
        OSError: the folder cannot be written.
    """
    if tokens is not None:
        end_of_text = tokens.end_of_text
    else:
        end_of_text = _GPT2_END_OF_TEXT if config.vocab_size == _GPT2_VOCAB_SIZE else None
    content = {"config.json": configs.to_json(config, state_dict[HEAD].dtype, end_of_text)}
    if tokens is not None:
        content |= tokenizer.to_files(tokens, config.block_size)
    with new_folder(Path(folder).expanduser()) as path:
        write_tensors(path / weights.FILE, weights.to_hugging_face(config, state_dict))
        for name, part in content.items():
            write_json(path / name, part)
