"""Whatever is proposed, what stands is distributed as the larger model says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptfast import GPT
from gptfast.generation import sampling, speculative
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from gptfast.generation.verification import verify
from tests.support.drafts import generator, gpt, merged, ragged
from tests.support.oracle import DEVICE


def processed(model: GPT, sequences: Tensor, prompt: int, settings: Sampling) -> Tensor:
    """The probabilities [B, V] of what follows sequences [B, T]."""
    logits = model(sequences)[0][:, -1]
    lengths = torch.full((len(sequences),), sequences.shape[1], device=DEVICE)
    logits = sampling.penalize(logits, sequences, lengths, torch.full_like(lengths, prompt), settings)
    if settings.no_repeat_ngram_size:
        logits = sampling.block_ngrams(logits, sequences, lengths, settings.no_repeat_ngram_size)
    return sampling.filtered(logits, settings).softmax(-1)


@torch.no_grad()
def joint(model: GPT, prompt: Tensor, new: int, settings: Sampling) -> Tensor:
    """The probability of every continuation, [V ** new]."""
    vocabulary = model.config.vocab_size
    sequences, probabilities = prompt, torch.ones(1, device=DEVICE)
    for _ in range(new):
        following = processed(model, sequences, prompt.shape[1], settings)  # [B, V]
        probabilities = (probabilities[:, None] * following).flatten()
        tokens = torch.arange(vocabulary, device=DEVICE).repeat(len(sequences))[:, None]
        sequences = torch.cat((sequences.repeat_interleave(vocabulary, dim=0), tokens), dim=1)
    return probabilities


def assert_distributed(counts: Tensor, probabilities: Tensor) -> None:
    """Chi-square; cells of which less than five are expected count as one."""
    counts, expected = counts.double().cpu(), probabilities.double().cpu() * counts.sum().item()
    assert not counts[expected == 0.0].any()
    rare = expected < 5.0
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    some = expected > 0.0
    # the 99.99% quantile, as Wilson and Hilferty approximate it
    freedom = int(some.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < limit


TINY = {"vocab_size": 5, "n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 6, "init_std": 0.7}


@pytest.mark.parametrize(
    "settings",
    [Sampling(), Sampling(temperature=0.7, top_k=3, repetition_penalty=1.4, frequency_penalty=0.5),
     Sampling(top_p=0.8, no_repeat_ngram_size=2)],
    ids=["plain", "penalties and top-k", "ngrams and top-p"],
)  # fmt: skip
def test_continuations_are_distributed_as_the_models(settings):
    """Three tokens together, from two proposals at a time: what follows depends on what was accepted."""
    model, other, prompt = gpt(3, **TINY), gpt(4, **TINY), ragged(2, vocabulary=5)
    samples, draft = 6000, Draft(other, 2)
    found = merged(
        speculative.steps(model, draft, prompt.repeat(samples, 1), [2] * samples, 3, settings, generator=generator()),
        samples,
    )
    tokens = torch.tensor([tokens for tokens, _ in found])
    codes = tokens @ torch.tensor([25, 5, 1])
    assert_distributed(codes.bincount(minlength=125), joint(model, prompt, 3, settings))
    assert 0.2 < draft.acceptance_rate < 0.9


def distributions(*shape: int, seed: int = 0) -> Tensor:
    return (2.0 * torch.randn(shape, generator=generator(seed), device=DEVICE)).softmax(-1)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_round_has_the_models_distribution(count):
    """Each token up to the first rejection and the one after are as p has them, given those before."""
    samples, vocabulary = 300_000, 4
    p, q = distributions(count + 1, vocabulary), distributions(count + 1, vocabulary, seed=1)
    p[0, 0] = 0.0
    p, q = p / p.sum(-1, keepdim=True), q.clone()
    q[-1] = 0.0
    random = generator()
    times = sampling.exponentials(torch.empty(samples, count + 1, vocabulary, device=DEVICE), random)
    proposals = (q / times).argmax(-1)[:, :count]
    uniforms = torch.rand(samples, count, generator=random, device=DEVICE)
    accepted, tokens = verify(
        p.expand(samples, -1, -1), q.expand(samples, -1, -1), proposals, uniforms,
        sampling.exponentials(torch.empty(samples, vocabulary, device=DEVICE), random),
    )  # fmt: skip
    assert accepted.shape == tokens.shape == (samples,)
    assert accepted.min() == 0
    assert accepted.max() == count
    for place in range(count + 1):
        reached = accepted >= place
        # p does not depend on tokens here, so that of each place must be distributed as p of that place
        following = proposals[:, place] if place < count else tokens
        given = torch.where(accepted > place, following, tokens)[reached]
        assert_distributed(given.bincount(minlength=vocabulary), p[place])
        if place < count:
            rate = (accepted > place).sum() / reached.sum()
            expected = torch.minimum(p[place], q[place]).sum()  # Leviathan et al. 2023, theorem 3.5
            assert rate.item() == pytest.approx(expected.item(), abs=0.02)


def test_equal_distributions_are_accepted():
    """Up to the largest number that is drawn below 1, for all roundings of the product."""
    p = distributions(1, 2, 1000)
    proposals = torch.arange(1000, device=DEVICE)[:, None]
    q = torch.cat((p[:, :1], torch.zeros_like(p[:, :1])), dim=1)
    below_1 = torch.full((1000, 1), 1.0 - 2.0**-24, device=DEVICE)
    accepted, _ = verify(
        p.expand(1000, -1, -1), q.expand(1000, -1, -1), proposals, below_1, torch.ones(1000, 1000, device=DEVICE)
    )
    assert accepted.all()


def test_what_cannot_be_is_not_drawn():
    """Where rounding leaves nothing of p - q, and where a number that is drawn is 0."""
    p = torch.tensor([[[0.0, 1.0 - 2.0**-24], [1.0, 0.0]]], device=DEVICE)
    q = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]], device=DEVICE)
    one, ones = torch.ones(1, 1, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    accepted, tokens = verify(p, q, one.long(), one, ones)
    assert (accepted.tolist(), tokens.tolist()) == ([0], [1])
    p, q = (
        torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], device=DEVICE),
        torch.tensor([[[0.5, 0.5], [0.0, 0.0]]], device=DEVICE),
    )
    accepted, tokens = verify(p, q, torch.zeros(1, 1, dtype=torch.int64, device=DEVICE), 0 * one, ones)
    assert (accepted.tolist(), tokens.tolist()) == ([0], [1])
