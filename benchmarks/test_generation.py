"""Tokens per second of greedy generation, time to the first token and time for each one after it."""

import torch

from benchmarks.measuring.model_bench import ModelCase
from gptfast import GPTConfig

NAMES = ("triton", "eager", "Hugging Face")
INT8 = ("triton int8", "eager int8")
COMPILED = ("triton compiled", "eager compiled")


def gpt2(model: str, batch: int, prompt: int, new_tokens: int, *names: str, **dtype: torch.dtype) -> ModelCase:
    # nanoGPT's GELU is the one by erf
    config = GPTConfig.preset(model, activation="gelu" if "nanoGPT" in names else "gelu_tanh")
    return ModelCase("generation", model, config, batch, prompt, names, new_tokens, **dtype)


NANO = GPTConfig(vocab_size=65, block_size=256, n_layer=4, n_head=4, n_embd=128, activation="gelu")
ON_GPU = [
    gpt2("gpt2", 1, 32, 128, *NAMES, *INT8),
    gpt2("gpt2", 64, 32, 128, *NAMES),
    *(gpt2(model, 1, 32, 32, *NAMES, *INT8) for model in ("gpt2-medium", "gpt2-large", "gpt2-xl")),
    gpt2("gpt2", 1, 32, 64, *NAMES, *COMPILED),  # last: it compiles
]
ON_CPU = [
    *(ModelCase("generation", "nano", NANO, batch, 32, ("cpu", *NAMES, "nanoGPT"), 64) for batch in (1, 16)),
    # nanoGPT has no KV cache: a minute for each of its rounds
    gpt2("gpt2", 1, 16, 256, "cpu", *NAMES, "nanoGPT"),
    gpt2("gpt2", 1, 16, 256, "cpu", "cpu int8", *NAMES, *INT8, dtype=torch.bfloat16),
]
CASES = ON_GPU if torch.cuda.is_available() else ON_CPU


def test_generation(record):
    record()
