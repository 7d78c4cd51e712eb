"""One block of every preset, against eager PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig
from gptfast.config import PRESETS
from tests.support.oracle import DEVICE, assert_equal_to_oracle

VOCABULARY = 1003
WIDE = [name for name in PRESETS if name not in ("gpt2", "gpt2-medium")]
# relative tolerance of the training loss to that of the evaluation's logits, whose matmul may round differently
SAME_LOGITS = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float64: 1e-12}


def tokens(seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weights(config: GPTConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Initial weights with perturbed biases and norms, because zeros and ones would hide whether they are used."""
    torch.manual_seed(0)
    model = GPT(config, "eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).state_dict()


def run(config: GPTConfig, backend: str, dtype: torch.dtype, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients in training, and logits in evaluation."""
    model = GPT(config, backend).to(DEVICE, dtype)
    model.load_state_dict(state)
    idx, targets = tokens(1), tokens(2)
    logits, loss = model(idx, targets)
    assert (logits is None) == (backend == "triton")
    loss.backward()
    with torch.no_grad():
        logits, _ = model.eval()(idx, targets)
    expected = torch.nn.functional.cross_entropy(logits[0].double(), targets[0])
    torch.testing.assert_close(loss.detach().double(), expected, rtol=SAME_LOGITS[dtype], atol=0.0)
    outcome = {"loss": loss.detach(), "logits": logits}
    for name, parameter in model.named_parameters():
        if "c_attn" in name:  # gradients of values are the largest, and would hide errors of the others
            parts = zip(("query", "key", "value"), parameter.grad.chunk(3), strict=True)
            outcome |= {f"{part} of {name}": gradient for part, gradient in parts}
        else:
            outcome[name] = parameter.grad
    return outcome


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "preset", ["gpt2", "gpt2-medium", *(pytest.param(name, marks=pytest.mark.slow) for name in WIDE)]
)
def test_preset_of_triton_equals_eager(preset: str, dtype: torch.dtype):
    """Loss, logits and every gradient, by the oracle rule of the operators."""
    config = GPTConfig.preset(preset, n_layer=1, block_size=16, vocab_size=VOCABULARY, pad_vocab_size_to=128)
    state = weights(config, dtype)
    ours, theirs = run(config, "triton", dtype, state), run(config, "eager", dtype, state)
    exact = run(config, "eager", torch.float64, state)
    assert set(ours) == set(exact)
    largest = {name: oracle.abs().max().item() for name, oracle in exact.items()}
    magnitudes = {}
    # the loss has the ulps of its logits, and eager's errors may cancel in the mean
    magnitudes["loss"] = largest["logits"] * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    # softmax cancels a key's bias, which adds one number to all scores of a query: its gradient is rounding alone
    key = "key of transformer.h.0.attn.c_attn"
    assert largest[f"{key}.bias"] < 1e-9 * largest[f"{key}.weight"]
    magnitudes[f"{key}.bias"] = largest[f"{key}.weight"]
    for name, oracle in exact.items():
        assert_equal_to_oracle(name, ours[name], theirs[name], oracle, magnitudes.get(name, 0.0))
