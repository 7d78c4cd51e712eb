"""The loss of each token is that of a float64 loop, independent of its batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, quantize
from gptfast.evaluation.token_losses import token_losses
from tests.support.likelihood import exact_log_probabilities

CONFIG = GPTConfig(block_size=12, vocab_size=31, n_layer=1, n_head=2, n_embd=32, init_std=0.3)
each_backend = pytest.mark.parametrize("backend", ["eager", "triton"])


def build(backend: str = "eager", **settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), backend)


def batch(rows: int = 5) -> tuple[Tensor, Tensor]:
    ids = torch.randint(31, (rows, 13), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def losses(model: GPT, idx: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return token_losses(model, idx, targets, dtype)


@each_backend
@pytest.mark.parametrize("padding", [1, 64])
def test_token_losses_are_those_of_a_float64_loop(backend: str, padding: int):
    model, (idx, targets) = build(backend, pad_vocab_size_to=padding), batch(3)
    found = losses(model, idx, targets)
    assert (found.shape, found.dtype, found.requires_grad) == ((3, 12), torch.float64, False)
    rows = torch.cat((idx, targets[:, -1:]), 1).tolist()
    expected = -torch.tensor([exact_log_probabilities(model, row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_backend
def test_token_losses_skip_negative_targets(backend: str):
    model, (idx, targets) = build(backend), batch(3)
    counted = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    counted[1] = False
    found = losses(model, idx, targets.masked_fill(~counted, -1))
    torch.testing.assert_close(found[counted], losses(model, idx, targets)[counted], rtol=1e-6, atol=1e-6)
    assert not found[~counted].any()
    assert not losses(model, idx, torch.full((3, 12), -100)).any()


def test_token_losses_ignore_padding_on_the_right():
    model, (idx, targets) = build(), batch()
    expected = losses(model, idx[:, :7], targets[:, :7])
    idx[:, 7:], targets[:, 7:] = 0, -1
    torch.testing.assert_close(losses(model, idx, targets)[:, :7], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("backend", "rows"), [("eager", 100), ("triton", 1)])
def test_token_losses_hold_few_logits_at_a_time(backend: str, rows: int):
    """The Triton loss holds none."""
    model, (idx, targets), held = build(backend), batch(rows), []
    expected = losses(model, idx, targets)
    model.lm_head.register_forward_hook(lambda head, given, logits: held.append(len(logits)))
    assert torch.equal(losses(model, idx, targets), expected)
    assert (sum(held), max(held, default=0) <= 1024) == (1200 if backend == "eager" else 0, True)


def test_token_losses_multiply_in_the_given_dtype():
    model, (idx, targets), dtypes = build(), batch(), set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda linear, given, y: dtypes.add(y.dtype))
    found = losses(model, idx, targets, torch.bfloat16)
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(found, losses(model, idx, targets), rtol=0.1, atol=0.1)


def test_token_losses_of_a_quantized_model():
    model, (idx, targets) = build(), batch()
    found, expected = losses(quantize(model), idx, targets), losses(model, idx, targets)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("training", [True, False])
def test_token_losses_have_no_dropout_and_restore_the_mode(training: bool):
    model, (idx, targets) = build(dropout=0.5).train(training), batch()
    assert torch.equal(losses(model, idx, targets), losses(build(), idx, targets))
    assert {module.training for module in model.modules()} == {training}
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@each_backend
def test_token_losses_reject_values_that_are_not_finite(value: float, backend: str):
    model, (idx, targets) = build(backend), batch()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = value
    with pytest.raises(RuntimeError, match=r"a loss of (nan|inf) in bfloat16.* --dtype float32"):
        losses(model, idx, targets, torch.bfloat16)


@pytest.mark.parametrize("padding", [1, 64])
@pytest.mark.parametrize("place", [0, 1], ids=["idx", "targets"])
def test_token_losses_reject_tokens_out_of_range(place: int, padding: int):
    """Rows of a padded embedding included."""
    given = batch()
    given[place][2, 3] = 31
    with pytest.raises(ValueError, match=r"token id 31 .* 0 to 30"):
        losses(build(pad_vocab_size_to=padding), *given)
