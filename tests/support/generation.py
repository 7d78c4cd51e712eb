"""Small models, drafts, prompts and requests for tests of generation."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from gptfast import GPT, Draft, GPTConfig, Sampling
from gptfast.generation.autoregressive import Step, decode_n_tokens
from gptfast.generation.decoder import GenerationRequest
from gptfast.generation.speculative import speculative_decode
from tests.support.oracle import DEVICE

GREEDY = Sampling(temperature=0.0)
CONFIG = {"block_size": 16, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 32, "init_std": 0.3}

VARIANTS = {
    "pre-norm": {},
    "post-norm": {"norm_position": "post", "activation": "relu"},
    "sinusoidal": {"position": "sinusoidal", "bias": False},
    "no positions": {"position": "none"},
}


def gpt(seed: int = 0, backend: str = "eager", **changes) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**CONFIG | changes), backend=backend).to(DEVICE).eval()


def perturbed(model: GPT, by: float = 0.05) -> GPT:
    """A draft with some proposals that the model accepts, and some that it rejects."""
    other, noise = copy.deepcopy(model), torch.Generator(DEVICE).manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=noise, device=DEVICE))
    return other


def contrary(model: GPT) -> GPT:
    """A draft that proposes the model's unlikeliest token."""
    other = copy.deepcopy(model)
    other.lm_head.weight = torch.nn.Parameter(-other.lm_head.weight)
    return other


DRAFTS = {"the model itself": lambda model: model, "perturbed": perturbed, "another": lambda model: gpt(1, n_layer=1),
          "contrary": contrary}  # fmt: skip


def cpu_gpt(dtype: torch.dtype = torch.float32, **changes) -> GPT:
    """A model for the CPU whose biases are not 0."""
    model = gpt(backend="auto", block_size=12, **changes).cpu()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype)


@torch.no_grad()
def logits(model: GPT, idx: Tensor) -> Tensor:
    return model.logits(model.transformer(idx))


def prompts(*lengths: int, vocab_size: int = 23) -> Tensor:
    """Prompts of these lengths, padded with a token that must not matter."""
    idx = torch.randint(vocab_size, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    for row, length in enumerate(lengths):
        idx[row, length:] = vocab_size - 1
    return idx.to(DEVICE)


def request(lengths: list[int], new: int, sampling: Sampling = GREEDY, **options) -> GenerationRequest:
    return GenerationRequest(prompts(*lengths), lengths, new, sampling, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def by_row(steps: Iterable[Step], rows: int) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of each row."""
    sequences: list[tuple[list[int], list[float]]] = [([], []) for _ in range(rows)]
    for step in steps:
        assert len(step.rows) == len(set(step.rows)) == len(step.tokens) == len(step.log_probs)
        for row, token, log_prob in zip(*step, strict=True):
            sequences[row][0].append(token)
            sequences[row][1].append(log_prob)
    return sequences


def assert_as_plain(model: GPT, draft: Draft, lengths: list[int], new: int, sampling: Sampling = GREEDY, **options):
    """Greedy decoding with a draft gives the tokens of decoding without."""
    asked = request(lengths, new, sampling, **options)
    expected = by_row(decode_n_tokens(model, asked), len(lengths))
    found = by_row(speculative_decode(model, draft, asked), len(lengths))
    for (tokens, log_probs), (plain_tokens, plain_log_probs) in zip(found, expected, strict=True):
        assert tokens == plain_tokens
        assert len(tokens) == new
        assert log_probs == pytest.approx(plain_log_probs, abs=1e-4)
