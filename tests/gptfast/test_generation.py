import pytest
import torch

from gptfast import GPT, GPTConfig, generation
from oracle import DEVICE

CONFIG = {"block_size": 8, "vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 16, "init_std": 0.3}


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**CONFIG, dropout=0.5)).to(DEVICE)


def prompt(*shape: int) -> torch.Tensor:
    return torch.randint(23, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def test_greedy_takes_the_likeliest_token_of_the_last_window(model):
    idx = prompt(2, 3)
    written = model.generate(idx, 12, temperature=0.0)
    assert written.shape == (2, 15)
    assert torch.equal(written[:, :3], idx)
    model.eval()
    for end in range(3, 15):
        logits, _ = model(written[:, max(0, end - 8) : end])
        assert torch.equal(written[:, end], logits[:, -1].argmax(-1))


def test_the_likeliest_of_one_is_greedy(model):
    idx = prompt(1, 3)
    assert torch.equal(model.generate(idx, 10, top_k=1), model.generate(idx, 10, temperature=0))


def test_a_generator_makes_sampling_repeatable(model):
    idx = prompt(1, 3)
    first = model.generate(idx, 20, generator=generator())
    assert torch.equal(first, model.generate(idx, 20, generator=generator()))
    assert not torch.equal(first, model.generate(idx, 20, generator=generator(1)))


def test_the_mode_of_the_model_is_left_alone(model):
    for training in (True, False):
        model.train(training)
        model.generate(prompt(1, 3), 1)
        assert model.training is training


def test_sampling_frequencies():
    """Chi-square of 20,000 draws against softmax(logits / temperature), with and without top-k."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], device=DEVICE)
    for top_k, kept in ((None, 5), (3, 3)):
        drawn = generation.sample(logits.expand(20_000, 5), 1.5, top_k, generator())
        counts = torch.bincount(drawn[:, 0], minlength=5).double().cpu()
        expected = 20_000 * torch.softmax(logits[:kept].double() / 1.5, 0).cpu()
        assert not counts[kept:].any()
        # 99.99% quantiles of chi-square with 4 and 2 degrees of freedom
        assert ((counts[:kept] - expected) ** 2 / expected).sum() < {5: 23.5, 3: 18.4}[kept]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 5e-324])
def test_the_smallest_temperatures_are_greedy(model, temperature):
    idx = prompt(1, 3)
    greedy = model.generate(idx, 10, temperature=0)
    assert torch.equal(model.generate(idx, 10, temperature=temperature), greedy)
    assert torch.equal(model.generate(idx, 10, temperature=temperature, top_k=5), greedy)


def test_top_k_beyond_the_vocabulary_keeps_all(model):
    idx = prompt(1, 3)
    assert torch.equal(
        model.generate(idx, 5, top_k=1000, generator=generator()), model.generate(idx, 5, generator=generator())
    )


def test_nothing_asked_for_is_nothing_added(model):
    assert torch.equal(model.generate(prompt(2, 3), 0), prompt(2, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"idx": torch.zeros(1, 0, dtype=torch.long)}, r"idx must be \[B, T\] with T >= 1, got shape \(1, 0\)"),
    ],
)
def test_bad_settings(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"idx": prompt(1, 3), "max_new_tokens": 1} | arguments)
