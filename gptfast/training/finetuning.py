"""Beginning with weights that are trained already, and training a part of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from gptfast import lora
from gptfast.checkpoint import run_folder
from gptfast.config import GPTConfig
from gptfast.huggingface.read import with_tokenizer
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer
from gptfast.training.config import TrainConfig


@dataclass(frozen=True)
class Initial:
    """A trained model to go on from.

    Args:
        source: where it comes from.
        model: on the CPU.
        tokenizer: its own, where it has one.
    """

    source: str
    model: GPT
    tokenizer: Tokenizer | None


def initial(source: str, wanted: GPTConfig) -> Initial:
    """The model of a run folder, of a folder in Hugging Face's layout, or of a name on the hub.

    Args:
        source: which.
        wanted: settings of which the block size, dropout and padding are taken, all others are the model's own.

    Raises:
        ValueError: there is no such model, it is damaged, or its context is shorter than the block size.
    """
    path = Path(source).expanduser()
    tokenizer: Tokenizer | None
    if run_folder.is_run(path):
        found, tokenizer = run_folder.load(path, torch.device("cpu"), "eager")
    else:
        found, tokenizer = with_tokenizer(source if not path.is_dir() else str(path), "eager")
    if wanted.block_size > found.config.block_size:
        raise ValueError(
            f"{source} has block_size={found.config.block_size}, less than the {wanted.block_size} asked for; give "
            f"--block-size {found.config.block_size}"
        )
    found.crop_block_size(wanted.block_size)
    model = GPT(shaped(found.config, wanted), "eager")  # dropout and padding are set when a model is built
    model.load_state_dict(found.state_dict())
    return Initial(source, model, tokenizer)


def shaped(own: GPTConfig, wanted: GPTConfig) -> GPTConfig:
    """The settings of a trained model, with those of `wanted` that may be others."""
    return dataclasses.replace(
        own, block_size=wanted.block_size, dropout=wanted.dropout, pad_vocab_size_to=wanted.pad_vocab_size_to
    )


def require_vocabulary(start: Initial, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless a model's vocabulary is the tokenizer's."""
    size = start.model.config.vocab_size
    if tokenizer.vocab_size != size:
        raise ValueError(
            f"{start.source} has a vocabulary of {size} tokens, the tokenizer one of {tokenizer.vocab_size}; give the "
            "model's own, such as --tokenizer gpt2"
        )


def restrict(model: GPT, config: TrainConfig) -> None:
    """Train what the settings name alone: adapters, or all parameters but those frozen.

    Raises:
        ValueError: patterns that match nothing, or adapters in processes that have parts of parameters.
    """
    if config.lora_rank:
        if config.parallel == "fsdp":
            raise ValueError("adapters work with --parallel ddp, not with fsdp")
        lora.apply(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    elif config.freeze:
        lora.freeze(model, config.freeze)
