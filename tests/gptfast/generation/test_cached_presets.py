"""Every preset's model decodes with a KV cache the tokens it decodes without, with logits within the oracle's bound."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gptfast import GPT, Sampling
from gptfast.config import PRESETS
from gptfast.generation.decoder import CachedDecoder, GenerationRequest, RawLogits
from gptfast.generation.generate import continuations
from gptfast.training.recipes import RECIPES
from tests.support.oracle import DEVICE, assert_equal_to_oracle

MODELS = {**PRESETS, **{name: recipe.model for name, recipe in RECIPES.items()}}
PROMPTS = {"one": [5], "even": [4, 4, 4], "ragged": [1, 6, 3]}
NEW = 8  # past the window of the longest prompt


def build(name: str, backend: str, dtype: torch.dtype) -> GPT:
    """Two layers of the preset's kind, narrow where Triton's interpreter computes them."""
    changes = {"n_layer": 2, "block_size": 12, "vocab_size": 101, "dropout": 0.0, "init_std": 0.1}
    whole = MODELS[name]
    if DEVICE.type != "cuda":
        changes |= {"n_head": 2, "n_embd": 2 * whole.n_embd // whole.n_head}
    torch.manual_seed(0)
    with DEVICE:  # faster than drawing wide weights on the CPU
        model = GPT(dataclasses.replace(whole, **changes), backend=backend)
    return model.to(dtype).eval()


def prompts(lengths: list[int]) -> Tensor:
    return torch.randint(101, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@torch.no_grad()
def uncached(model: GPT, sequence: Tensor) -> list[int]:
    for _ in range(NEW):
        token = model(sequence[None, -12:])[0][0, -1].argmax()
        sequence = torch.cat((sequence, token[None]))
    return sequence[-NEW:].tolist()


SLOW = [pytest.param("triton", prompt, marks=pytest.mark.slow) for prompt in ("one", "even")]


@pytest.mark.parametrize(("backend", "prompt"), [*(("eager", p) for p in PROMPTS), ("triton", "ragged"), *SLOW])
@pytest.mark.parametrize("name", MODELS)
def test_cached_tokens_are_the_uncached(name, backend, prompt):
    lengths = PROMPTS[prompt]
    model, idx = build(name, backend, torch.float32), prompts(lengths)
    found = continuations(model, GenerationRequest(idx, lengths, NEW, Sampling(temperature=0.0)))
    for row, (continuation,) in enumerate(found):
        assert continuation.tokens == uncached(model, idx[row, : lengths[row]])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_within_the_bound_at_every_step(name, backend, dtype):
    lengths = PROMPTS["ragged"]
    model, exact, eager = build(name, backend, dtype), build(name, "eager", dtype).double(), build(name, "eager", dtype)
    idx = prompts(lengths)
    decoder = CachedDecoder(model, GenerationRequest(idx, lengths, NEW), RawLogits())
    logits = decoder.prefill()
    sequences = [row[:length] for row, length in zip(idx, lengths, strict=True)]
    for number in range(NEW):
        theirs, oracle = (torch.stack([m(s[None, -12:])[0][0, -1] for s in sequences]) for m in (eager, exact))
        assert_equal_to_oracle(f"logits of step {number}", logits, theirs, oracle)
        tokens = oracle.argmax(-1)
        sequences = [torch.cat((sequence, token[None])) for sequence, token in zip(sequences, tokens, strict=True)]
        logits = decoder.decode_one_token(tokens)
