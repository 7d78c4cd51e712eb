"""Frozen parameters stay as they are, and all others are trained."""

from __future__ import annotations

import pytest
import torch

from gptfast import GPT, GPTConfig, TrainStep
from gptfast.lora import freeze
from tests.support.oracle import DEVICE

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=32)


def build(backend: str = "eager", **settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), backend).to(DEVICE)


def train(model: GPT) -> None:
    tokens = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    step = TrainStep(model, model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), DEVICE.type))
    for _ in range(2):
        step(tokens[:, :-1], tokens[:, 1:])


PATTERNS = [["transformer.h.[0-1].*"], ["transformer.w?e.weight"], ["*.bias", "*.mlp.*"], ["lm_head.weight"], []]


@pytest.mark.parametrize(
    ("backend", "patterns"), [*(("eager", patterns) for patterns in PATTERNS), ("triton", PATTERNS[2])]
)
def test_training_changes_the_others_alone(backend: str, patterns: list[str]):
    model, before = build(backend), build()
    frozen = freeze(model, patterns)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    train(model)
    same = {n for n, p in model.named_parameters() if torch.equal(p, before.get_parameter(n))}
    assert same == set(frozen)


def test_names_are_those_of_the_model_in_its_order():
    model = build(n_layer=3)
    assert freeze(model, ["transformer.h.[1-2].ln_2.*", "transformer.wte.*", "transformer.h.2.ln_2.bias"]) == [
        "transformer.wte.weight",
        "transformer.h.1.ln_2.weight",
        "transformer.h.1.ln_2.bias",
        "transformer.h.2.ln_2.weight",
        "transformer.h.2.ln_2.bias",
    ]


@pytest.mark.parametrize("pattern", ["transformer.wte.weight", "lm_head.weight", "*[te].weight"])
def test_a_tied_weight_has_two_names(pattern: str):
    model = build(position="none")
    assert "transformer.wte.weight" in freeze(model, [pattern])
    assert not model.lm_head.weight.requires_grad
    untied = build(tie_weights=False)
    assert freeze(untied, ["lm_head.weight"]) == ["lm_head.weight"]
    assert untied.transformer.wte.weight.requires_grad


def test_a_second_call_adds_to_the_first():
    model = build()
    freeze(model, ["transformer.h.0.*"])
    assert freeze(model, ["transformer.h.0.ln_1.*"]) == ["transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"]
    freeze(model, ["transformer.h.1.*"])
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    assert left == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["transformer.wte.*", "h.0.*"],
            r"no parameter matches 'h\.0\.\*'; accepted: names such as transformer\.wte\.weight, transformer\.wpe\.w",
        ),
        (["Transformer.*"], r"no parameter matches 'Transformer\.\*'"),
        (["transformer.*"], r"patterns 'transformer\.\*' leave nothing to train; leave out at least one parameter"),
        (["*.weight", "*.bias"], r"patterns '\*\.weight', '\*\.bias' leave nothing to train"),
        ("*.bias", r"patterns must be a sequence of strings, got '\*\.bias'; accepted: \['\*\.bias'\]"),
    ],
)
def test_errors_leave_the_model_as_it_was(patterns, message: str):
    model = build()
    with pytest.raises(ValueError, match=message):
        freeze(model, patterns)
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_is_left_after_two_calls():
    model = build()
    freeze(model, ["*.weight"])
    with pytest.raises(ValueError, match=r"patterns '\*\.bias' leave nothing to train"):
        freeze(model, ["*.bias"])
    assert model.transformer.ln_f.bias.requires_grad
