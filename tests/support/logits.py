"""Logits and token sequences for tests of sampling, and numpy references of the filters."""

import math

import numpy as np
import torch
from hypothesis import assume, currently_in_test_context

from gptfast.generation.sampling import Sampling, exponential_noise, sample
from tests.support.oracle import DEVICE

INF = math.inf
NAN = math.nan
EVERYTHING = Sampling(
    temperature=0.8,
    top_k=40,
    top_p=0.9,
    min_p=0.02,
    typical_p=0.8,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    no_repeat_ngram_size=2,
)


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE)


def on_device(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, device=DEVICE)


def draw(logits: torch.Tensor, chosen: Sampling, random: torch.Generator | None = None) -> torch.Tensor:
    noise = None if chosen.temperature == 0.0 else exponential_noise(logits, random)
    return sample(logits, noise, chosen)


def kept(logits: torch.Tensor) -> np.ndarray:
    assert not logits.isnan().any()
    return (logits > -INF).cpu().numpy()


def ragged(vocabulary: int, width: int = 24, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sequences with invalid tokens as padding, their lengths and their prompts' lengths."""
    random = np.random.default_rng(seed)
    lengths = np.array([width, width - 5, 7, 3, 2, 1, 0, width])
    sequences = random.integers(vocabulary, size=(len(lengths), width))
    for row, length in enumerate(lengths):
        sequences[row, length:] = random.choice([-100, 0, 1, vocabulary, 2**40], size=width - length)
    prompts = np.minimum(lengths, [5, 0, 7, 1, 2, 0, 0, width - 1])
    return tuple(torch.from_numpy(part).to(DEVICE) for part in (sequences, lengths, prompts))


def assert_distributed(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Chi-square test at 99.99%; cells with less than five expected counts are merged."""
    counts, expected = counts.double().cpu(), probabilities.double().cpu() * counts.sum().item()
    assert not counts[expected == 0.0].any()
    rare = expected < 5.0
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    some = expected > 0.0
    freedom = int(some.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() < limit


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def numpy_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    return logits >= np.sort(logits)[-min(k, len(logits))]


def decided(far_enough: bool) -> None:
    """Skip a hypothesis example in which rounding decides."""
    if currently_in_test_context():
        assume(far_enough)


def numpy_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(logits)
    decided(np.abs(probabilities / probabilities.max() - p)[probabilities < probabilities.max()].min(initial=1) > 1e-5)
    return probabilities >= p * probabilities.max()


def numpy_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    return numpy_first(softmax(logits), np.argsort(-logits, kind="stable"), p)


def numpy_typical(logits: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(logits)
    information = np.full_like(logits, INF)
    information[probabilities > 0] = -np.log(probabilities[probabilities > 0])
    entropy = (probabilities * np.where(probabilities > 0, information, 0)).sum()
    distance = np.abs(information - entropy)
    for one in np.unique(logits[probabilities > 0]):  # rounding orders logits on both sides of the entropy
        others = distance[(logits != one) & (probabilities > 0)]
        decided(np.abs(others - distance[logits == one][0]).min(initial=1) > 1e-4)
    return numpy_first(probabilities, np.argsort(distance, kind="stable"), p)


def numpy_first(probabilities: np.ndarray, order: np.ndarray, p: float) -> np.ndarray:
    """The fewest first tokens in `order` whose probabilities add up to p."""
    chosen = np.zeros(len(order), dtype=bool)
    total = 0.0
    for index in order:
        chosen[index] = True
        total += probabilities[index]
        decided(abs(total - p) > 1e-5)
        if total >= p:
            break
    return chosen
