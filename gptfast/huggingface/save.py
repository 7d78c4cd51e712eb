"""A folder that Hugging Face's `transformers` loads: model, and tokenizer where there is one."""

from __future__ import annotations

from pathlib import Path

import torch

from gptfast import lora
from gptfast.checkpoint.atomic_files import new_folder, require_fit, write_json, write_tensors
from gptfast.huggingface import config, tokenizer, weights
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer

_GPT2_VOCABULARY, _GPT2_END_OF_TEXT = 50257, 50256


def save(model: GPT, folder: str | Path, tokens: Tokenizer | None = None) -> None:
    """Write a folder from which `transformers.AutoModelForCausalLM` makes a model with the same logits.

    It has `config.json` and `model.safetensors`, and with a tokenizer `tokenizer.json` and `tokenizer_config.json`, of
    which `transformers.AutoTokenizer` makes one with the same tokens, and a file that this package's commands take it
    from. Padding of the vocabulary is left out, adapters are merged, biases that the model lacks are zeros.
    The folder appears whole or not at all.

    Args:
        model: the GPT; weights are written in their dtype.
        folder: that does not exist yet or is empty.
        tokens: the model's tokenizer.

    Raises:
        ValueError: a setting that their GPT-2 does not have, weights that are no floats, a tokenizer that their format
            cannot hold, or a folder that is not empty.
        OSError: the folder cannot be written.
    """
    state = lora.merged_state_dict(model)
    with torch.device("meta"):
        plain = GPT(model.config, "eager").state_dict()
    shapes = {name: tensor.shape for name, tensor in plain.items()}
    require_fit("the model cannot be saved in Hugging Face's layout", state, shapes)
    end_of_text = _GPT2_END_OF_TEXT if model.config.vocab_size == _GPT2_VOCABULARY else None
    if tokens is not None:
        end_of_text = tokens.end_of_text
    content = {"config.json": config.written(model.config, state["lm_head.weight"].dtype, end_of_text)}
    if tokens is not None:
        content |= tokenizer.files(tokens, model.config.block_size)
    with new_folder(Path(folder).expanduser()) as path:
        write_tensors(path / weights.FILE, weights.written(model.config, state))
        for name, part in content.items():
            write_json(path / name, part)
