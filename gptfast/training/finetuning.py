"""Fine-tuning: starting from pretrained weights, and training a part of the parameters."""

from __future__ import annotations

import dataclasses

from gptfast import load_model, lora
from gptfast.config import GPTConfig
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer
from gptfast.training.config import TrainConfig


def load_pretrained(source: str, wanted: GPTConfig) -> tuple[GPT, Tokenizer | None]:
    """Load the model that a run starts from, on the CPU, and the tokenizer that comes with it, if any.

    Args:
        source: run folder, folder in Hugging Face's layout, or name on the hub.
        wanted: see `merge_config`.

    Raises:
        ValueError: no such model, a damaged one, or a context shorter than the block size.
    """
    pretrained, tokenizer = load_model.with_tokenizer(source)
    longest = pretrained.config.block_size
    if wanted.block_size > longest:
        raise ValueError(
            f"{source} has block_size={longest}, less than the {wanted.block_size} asked for; give --block-size "
            f"{longest}"
        )
    pretrained.crop_block_size(wanted.block_size)
    # dropout and padding take effect at construction only
    model = GPT(merge_config(pretrained.config, wanted), "eager")
    model.load_state_dict(pretrained.state_dict())
    return model, tokenizer


def merge_config(pretrained: GPTConfig, wanted: GPTConfig) -> GPTConfig:
    """Take block size, dropout and vocabulary padding from `wanted`, all other settings from the pretrained model."""
    return dataclasses.replace(
        pretrained, block_size=wanted.block_size, dropout=wanted.dropout, pad_vocab_size_to=wanted.pad_vocab_size_to
    )


def select_trainable(model: GPT, config: TrainConfig) -> None:
    """Add LoRA adapters and train them alone, or freeze the parameters that the config names.

    Raises:
        ValueError: a pattern that matches nothing, or adapters with FSDP.
    """
    if config.lora_rank:
        if config.parallel == "fsdp":
            raise ValueError("adapters work with --parallel ddp, not with fsdp")
        lora.apply(model, config.lora_rank, config.lora_alpha, config.lora_targets)
    elif config.freeze:
        lora.freeze(model, config.freeze)
