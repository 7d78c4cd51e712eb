"""Tokens per second of a training step: forward, backward, clipping and AdamW."""

import dataclasses

import torch

from benchmarks.measuring.model_bench import ModelCase
from gptfast import GPTConfig

BACKENDS = ("triton", "eager")
PEERS = ("Hugging Face", "nanoGPT")
COMPILED = ("triton compiled", "eager compiled")
CAPTURED = ("triton captured", "triton compiled captured")


def gpt2(model: str, batch: int, length: int, *providers: str) -> ModelCase:
    """A size of GPT-2 with a padded vocabulary."""
    config = GPTConfig.preset(model, vocab_size=50304, block_size=max(length, 1024))
    return ModelCase("training", model, config, batch, length, providers)


def small(model: str, batch: int, length: int, *providers: str) -> ModelCase:
    """One of nanoGPT's character models, for a laptop and the larger one, with the GELU by erf that all peers have."""
    config = GPTConfig(vocab_size=65, block_size=length, n_layer=4, n_head=4, n_embd=128, activation="gelu")
    if model == "baby":
        config = dataclasses.replace(config, n_layer=6, n_head=6, n_embd=384)
    return ModelCase("training", model, config, batch, length, providers)


# the most informative first: a short time budget drops the last ones. 32k tokens a step where they fit.
ON_GPU = [
    gpt2("gpt2", 32, 1024, *CAPTURED, *BACKENDS, *COMPILED, *PEERS),
    *(gpt2("gpt2", batch, 1024, *BACKENDS) for batch in (1, 4, 16)),
    *(gpt2("gpt2", 32_768 // length, length, *BACKENDS) for length in (256, 4096)),
    gpt2("gpt2-xl", 4, 1024, *BACKENDS, "Hugging Face"),
    gpt2("gpt2-large", 8, 1024, *BACKENDS, "Hugging Face"),
    gpt2("gpt2-medium", 16, 1024, *CAPTURED, *BACKENDS, *COMPILED, "Hugging Face"),
    # too small for a GPU: the time of the host's launches
    *(small("nano", batch, 64, "triton captured", *BACKENDS, *PEERS) for batch in (12, 1)),
    # compiling these takes minutes
    gpt2("gpt2-large", 4, 1024, *BACKENDS, *COMPILED),
    gpt2("gpt2-xl", 2, 1024, *BACKENDS, *COMPILED),
]
ON_CPU = [
    small("nano", 12, 64, "cpu", *BACKENDS, *COMPILED, *PEERS),
    small("baby", 4, 256, "cpu", "eager", *PEERS),
    *(small("nano", batch, 64, "cpu", "eager", "Hugging Face") for batch in (1, 4, 48)),
    *(small("nano", 768 // length, length, "cpu", "eager", "Hugging Face") for length in (16, 256)),
]
CASES = ON_GPU if torch.cuda.is_available() else ON_CPU


def test_training(record):
    record()
