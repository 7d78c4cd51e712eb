"""The loss of each token is that of a float64 loop, whatever goes through the model together with it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gptfast import GPT, GPTConfig, backend, quantize
from gptfast.evaluation import token_losses
from tests.support.likelihood import exact_log_probabilities

CONFIG = GPTConfig(block_size=12, vocab_size=31, n_layer=1, n_head=2, n_embd=32, init_std=0.3)


def build(backend: str = "eager", **settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), backend)


def rows(number: int = 5) -> torch.Tensor:
    return torch.randint(31, (number, 13), generator=torch.Generator().manual_seed(1))


def losses(model: GPT, idx: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return token_losses.losses(model, idx, targets, dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("padding", [1, 64])
def test_losses_are_those_of_a_float64_loop(backend: str, padding: int):
    model, ids = build(backend, pad_vocab_size_to=padding), rows(3)
    found = losses(model, ids[:, :-1], ids[:, 1:])
    assert (found.shape, found.dtype, found.requires_grad) == ((3, 12), torch.float64, False)
    expected = [[-value for value in exact_log_probabilities(model, row)] for row in ids.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_only_what_is_asked_for(backend: str):
    model, ids = build(backend), rows(3)
    asked = torch.rand(3, 12, generator=torch.Generator().manual_seed(2)) < 0.4
    asked[1] = False
    found = losses(model, ids[:, :-1], ids[:, 1:].masked_fill(~asked, -1))
    whole = losses(model, ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(found[asked], whole[asked], rtol=1e-6, atol=1e-6)
    assert not found[~asked].any()
    assert not losses(model, ids[:, :-1], torch.full((3, 12), -100)).any()


def test_what_stands_to_the_right_changes_nothing():
    model, ids = build(), rows()
    targets = ids[:, 1:].clone()
    targets[:, 7:] = -1
    padded = ids[:, :-1].clone()
    padded[:, 7:] = 0
    expected = losses(model, ids[:, :7], ids[:, 1:8])
    torch.testing.assert_close(losses(model, padded, targets)[:, :7], expected, rtol=1e-5, atol=1e-5)


def test_logits_in_parts(monkeypatch):
    model, ids = build(), rows()
    expected, seen = losses(model, ids[:, :-1], ids[:, 1:]), []
    monkeypatch.setattr(backend, "_LOGIT_ROWS", 7)
    model.lm_head.register_forward_hook(lambda head, arguments, logits: seen.append(len(logits)))
    torch.testing.assert_close(losses(model, ids[:, :-1], ids[:, 1:]), expected, rtol=1e-5, atol=1e-5)
    assert seen == [7] * 8 + [4]


def test_the_loss_of_the_backend():
    """Triton's never has the logits."""
    model, ids = build("triton"), rows(1)
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were computed"))
    assert losses(model, ids[:, :-1], ids[:, 1:]).all()


def test_products_are_in_the_dtype_asked_for():
    model, ids, seen = build(), rows(), set()
    whole = nn.Linear.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x: (y := whole(self, x), seen.add(y.dtype))[0])
        found = losses(model, ids[:, :-1], ids[:, 1:], torch.bfloat16)
    assert seen == {torch.bfloat16}
    torch.testing.assert_close(found, losses(model, ids[:, :-1], ids[:, 1:]), rtol=0.1, atol=0.1)


def test_a_model_with_weights_of_8_bits():
    model, ids = build(), rows()
    found = losses(quantize(model), ids[:, :-1], ids[:, 1:])
    expected = losses(model, ids[:, :-1], ids[:, 1:])
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(training: bool):
    model, ids = build(dropout=0.5).train(training), rows()
    expected = losses(build(), ids[:, :-1], ids[:, 1:])
    assert torch.equal(losses(model, ids[:, :-1], ids[:, 1:]), expected)  # without dropout
    assert {module.training for module in model.modules()} == {training}
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_losses_that_are_no_numbers(value: float, backend: str):
    model, ids = build(backend), rows()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = value
    message = r"gives a token a loss of (nan|inf): its weights are damaged, .* --dtype bfloat16 can tell; try --dtype"
    with pytest.raises(RuntimeError, match=message):
        losses(model, ids[:, :-1], ids[:, 1:], torch.bfloat16)


@pytest.mark.parametrize("padding", [1, 64])
@pytest.mark.parametrize("place", ["idx", "targets"])
def test_tokens_out_of_range(place: str, padding: int):
    """Also those that are rows of a padded embedding alone."""
    model, ids = build(pad_vocab_size_to=padding), rows()
    idx, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
    {"idx": idx, "targets": targets}[place][2, 3] = 31
    with pytest.raises(ValueError, match="token id 31 is out of range; accepted: 0 to 30"):
        losses(model, idx, targets)
