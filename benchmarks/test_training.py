"""Tokens per second of a training step: forward, backward, clipping and AdamW."""

import dataclasses

import pytest

from benchmarks.measuring.machine import default_device
from benchmarks.measuring.model_providers import ModelCase, providers
from benchmarks.measuring.pytest_bridge import CLOCK, case_id, report
from gptfast import GPTConfig

OURS = ("triton", "eager")
PEERS = ("Hugging Face", "nanoGPT")
COMPILED = ("triton compiled", "eager compiled")
CAPTURED = ("triton captured", "triton compiled captured")


def gpt2(model: str, batch: int, length: int, names: tuple[str, ...]) -> ModelCase:
    """A size of GPT-2, its vocabulary rounded up as everyone does who trains it."""
    config = GPTConfig.preset(model, vocab_size=50304, block_size=max(length, 1024))
    return ModelCase("training", model, config, batch, length, providers=names)


# character models with nanoGPT's GELU by erf, which all the peers have: its recipe for a laptop, and its larger one
SMALL = {
    "nano": GPTConfig(vocab_size=65, n_layer=4, n_head=4, n_embd=128, activation="gelu"),
    "baby": GPTConfig(vocab_size=65, n_layer=6, n_head=6, n_embd=384, activation="gelu"),
}


def small(model: str, batch: int, length: int, names: tuple[str, ...]) -> ModelCase:
    config = dataclasses.replace(SMALL[model], block_size=length)
    return ModelCase("training", model, config, batch, length, providers=names)


# most telling first: a run whose time is short loses the last ones. 32k tokens a step where they fit.
ON_GPU = [
    gpt2("gpt2", 32, 1024, (*CAPTURED, *OURS, *COMPILED, *PEERS)),
    *(gpt2("gpt2", batch, 1024, OURS) for batch in (1, 4, 16)),
    *(gpt2("gpt2", 32_768 // length, length, OURS) for length in (256, 4096)),
    gpt2("gpt2-xl", 4, 1024, (*OURS, "Hugging Face")),
    gpt2("gpt2-large", 8, 1024, (*OURS, "Hugging Face")),
    gpt2("gpt2-medium", 16, 1024, (*CAPTURED, *OURS, *COMPILED, "Hugging Face")),
    # too small for a GPU: what the host's launches cost
    *(small("nano", batch, 64, ("triton captured", *OURS, *PEERS)) for batch in (12, 1)),
    # compiling these takes minutes
    gpt2("gpt2-large", 4, 1024, (*OURS, *COMPILED)),
    gpt2("gpt2-xl", 2, 1024, (*OURS, *COMPILED)),
]
ON_CPU = [
    small("nano", 12, 64, ("cpu", *OURS, *COMPILED, *PEERS)),
    small("baby", 4, 256, ("cpu", "eager", *PEERS)),
    *(small("nano", batch, 64, ("cpu", "eager", "Hugging Face")) for batch in (1, 4, 48)),
    *(small("nano", 768 // length, length, ("cpu", "eager", "Hugging Face")) for length in (16, 256)),
]


@pytest.fixture(scope="module", params=ON_GPU if default_device().type == "cuda" else ON_CPU, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", providers(nanogpt=None))
@pytest.mark.parametrize("mode", ["step"])
def test_training(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
