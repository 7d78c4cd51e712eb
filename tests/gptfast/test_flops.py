import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptfast import GPT, GPTConfig, flops
from gptfast.training.recipes import GPT_CONFIG_124M


def test_flops_per_token_follow_palm():
    """Published figures of the 124M model: 854.4 MFLOP per token with full attention, 797.8 with causal."""
    config = GPTConfig.preset("gpt2")
    assert flops.training_flops_per_token(config) == 6 * 123_532_032 + 12 * 12 * 768 * 1024 == 854_438_400
    causal = flops.training_flops_per_token(config, causal=True)
    assert causal == 6 * 123_532_032 + 6 * 12 * 768 * 1025
    assert causal / 1e6 == pytest.approx(797.8, abs=0.1)
    padded = GPTConfig.preset("gpt2", pad_vocab_size_to=128)  # padding is not counted
    assert flops.training_flops_per_token(padded) == flops.training_flops_per_token(config)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_flops_per_token_equal_pytorchs_count(backend):
    """Exactly, but for two differences of Triton: the backward recomputes the scores, and the loss computes the head's
    gradients in the forward.
    """
    batch, length = 2, 24
    config = GPTConfig(block_size=length, vocab_size=101, n_layer=3, n_head=2, n_embd=32)
    with torch.device("meta"):
        model = GPT(config, backend=backend)
        idx = torch.zeros(batch, length, dtype=torch.long)
    with FlopCounterMode(display=False) as forward:
        _, loss = model(idx, idx)
    early = 4 * batch * length * config.n_embd * config.vocab_size if backend == "triton" else 0
    expected = batch * length * flops.forward_flops_per_token(config)
    assert forward.get_total_flops() == expected + early
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    scores = config.n_layer * 2 * batch * length * length * config.n_embd
    recomputed = scores if backend == "triton" else 0
    assert backward.get_total_flops() + early == 2 * expected + recomputed


def test_utilisation_of_the_roofline_is_the_mfu():
    """PaLM's ratio of throughputs equals model FLOPs per second over peak FLOP/s."""
    config = GPTConfig.from_dict(GPT_CONFIG_124M)
    speed = 24 * 1024 / 0.5
    most = flops.roofline_tokens_per_second(config, peak=312e12)
    assert most == 312e12 / 854_438_400  # tied and untied heads cost the same
    assert flops.utilisation(speed, most) == pytest.approx(854_438_400 * 24 * 1024 / 0.5 / 312e12, rel=1e-12)
    short = flops.roofline_tokens_per_second(config, 312e12, length=64, causal=True)
    assert short == 312e12 / flops.training_flops_per_token(config, 64, causal=True) > most
    assert flops.utilisation(speed, flops.roofline_tokens_per_second(config, peak=None)) is None
