import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptfast import GPT, GPTConfig, flops


def test_gpt2_by_the_palm_convention():
    """Figures that others publish for the 124M model: 854.4 MFLOP per token with full attention, 797.8 causal."""
    config = GPTConfig.preset("gpt2")
    assert flops.training_flops_per_token(config) == 6 * 123_532_032 + 12 * 12 * 768 * 1024 == 854_438_400
    causal = flops.training_flops_per_token(config, causal=True)
    assert causal == 6 * 123_532_032 + 6 * 12 * 768 * 1025
    assert causal / 1e6 == pytest.approx(797.8, abs=0.1)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_closed_form_equals_what_pytorch_counts(backend):
    """On the meta device; exactly, apart from the scores that the Triton backward computes a second time.

    The Triton loss has both gradients of the head computed with the logits, in the forward.
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
