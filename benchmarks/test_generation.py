"""Tokens per second of greedy generation, time to the first token and time for each one after it."""

import pytest
import torch

from benchmarks.measuring.machine import default_device
from benchmarks.measuring.model_providers import ModelCase, providers
from benchmarks.measuring.pytest_bridge import CLOCK, case_id, report
from gptfast import GPTConfig

NAMES = ("triton", "eager", "Hugging Face")
INT8 = ("triton int8", "eager int8")
COMPILED = ("triton compiled", "eager compiled")


def gpt2(model: str, batch: int, prompt: int, new_tokens: int, names: tuple[str, ...] = NAMES, **dtype) -> ModelCase:
    # nanoGPT's GELU is the one by erf
    config = GPTConfig.preset(model, activation="gelu" if "nanoGPT" in names else "gelu_tanh")
    return ModelCase("generation", model, config, batch, prompt, new_tokens, names, **dtype)


NANO = GPTConfig(vocab_size=65, block_size=256, n_layer=4, n_head=4, n_embd=128, activation="gelu")
ON_GPU = [
    gpt2("gpt2", 1, 32, 128, (*NAMES, *INT8)),
    gpt2("gpt2", 64, 32, 128),
    *(gpt2(model, 1, 32, 32, (*NAMES, *INT8)) for model in ("gpt2-medium", "gpt2-large", "gpt2-xl")),
    gpt2("gpt2", 1, 32, 64, (*NAMES, *COMPILED)),  # last: it compiles
]
ON_CPU = [
    ModelCase("generation", "nano", NANO, 1, 32, 64, ("cpu", *NAMES, "nanoGPT")),
    ModelCase("generation", "nano", NANO, 16, 32, 64, ("cpu", *NAMES, "nanoGPT")),
    # nanoGPT keeps no keys and values: a minute for each of its rounds
    gpt2("gpt2", 1, 16, 256, ("cpu", *NAMES, "nanoGPT")),
    gpt2("gpt2", 1, 16, 256, ("cpu", "cpu int8", *NAMES, *INT8), dtype=torch.bfloat16),
]


@pytest.fixture(scope="module", params=ON_GPU if default_device().type == "cuda" else ON_CPU, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", providers(nanogpt=None))
@pytest.mark.parametrize("mode", ["generate"])
def test_generation(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
