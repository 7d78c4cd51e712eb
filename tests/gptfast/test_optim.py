"""Each trained parameter has one optimizer, state comes back bit for bit, and schedules have their shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, TrainStep, lora, optim

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
MODELS = {
    "tied": {},
    "untied": {"tie_weights": False},
    "no biases": {"bias": False},
    "no positions, padded": {"position": "none", "pad_vocab_size_to": 64},
}
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
HIDDEN = {f"transformer.h.{block}.{layer}.weight" for block in (0, 1) for layer in MATRICES}

each_optimizer = pytest.mark.parametrize("name", optim.OPTIMIZERS)


def build(**settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), "eager")


def optimizers_of(name: str, model: GPT) -> list[torch.optim.Optimizer]:
    return optim.build(name, model.named_parameters(), 0.1, 1e-2, (0.8, 0.95), "cpu")


def names_of(model: GPT) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def held(optimizer: torch.optim.Optimizer, model: GPT) -> list[str]:
    """Names of an optimizer's parameters."""
    names = names_of(model)
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(31, (count, 4, 9), generator=torch.Generator().manual_seed(1))
    return [(part[:, :-1], part[:, 1:]) for part in tokens]


def hyperparameters(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    return [{k: v for k, v in group.items() if k != "params"} for o in optimizers for group in o.param_groups]


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_build_gives_each_parameter_one_optimizer(settings):
    model = build(**settings)
    everything = sorted(dict(model.named_parameters()))
    (adamw,) = optimizers_of("adamw", model)
    assert sorted(held(adamw, model)) == everything
    muon, rest = optimizers_of("muon", model)
    assert (type(muon), type(rest)) == (torch.optim.Muon, torch.optim.AdamW)
    assert sorted(held(muon, model)) == sorted(HIDDEN)
    assert sorted(held(muon, model) + held(rest, model)) == everything


@each_optimizer
def test_build_sets_hyperparameters(name: str):
    for optimizer in optimizers_of(name, build()):
        for group in optimizer.param_groups:
            assert {(p.dim() == 2, group["weight_decay"]) for p in group["params"]} in ({(True, 0.1)}, {(False, 0.0)})
            assert group["lr"] == 1e-2
            # Muon has neither
            assert (group.get("betas", (0.8, 0.95)), group.get("fused", True)) == ((0.8, 0.95), True)


@each_optimizer
def test_build_skips_frozen_parameters(name: str):
    model = build()
    frozen = lora.freeze(model, ["transformer.h.0.*", "*.bias", "transformer.wte.*"])
    found = [n for optimizer in optimizers_of(name, model) for n in held(optimizer, model)]
    assert sorted(found + frozen) == sorted(dict(model.named_parameters()))


def test_build_muon_alone_for_adapters():
    model = build()
    lora.apply(model, 2, 4.0, ["*.attn.*"])
    (muon,) = optimizers_of("muon", model)
    assert {name.rpartition(".")[2] for name in held(muon, model)} == {"lora_a", "lora_b"}
    assert len(held(muon, model)) == 8


@pytest.mark.parametrize("patterns", [["transformer.h.*"], ["*.attn.*.weight", "*.mlp.*.weight"]])
def test_build_muon_rejects_a_model_without_trained_matrices(patterns: list[str]):
    model = build()
    lora.freeze(model, patterns)
    with pytest.raises(ValueError, match="optimizer 'muon'"):
        optimizers_of("muon", model)


@each_optimizer
def test_training_lowers_the_loss(name: str):
    model = build()
    step = TrainStep(model, optimizers_of(name, model), grad_clip=1.0)
    (batch,) = batches(1)
    losses = [step(*batch).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 1.0
    assert losses == sorted(losses, reverse=True)


KEYS = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}}


@pytest.mark.parametrize("frozen", [[], ["transformer.h.0.*", "*.bias"]], ids=["", "frozen"])
@each_optimizer
def test_state_dict_continues_training_bit_for_bit(name: str, frozen: list[str]):
    def prepared() -> tuple[GPT, list[torch.optim.Optimizer], TrainStep]:
        model = build()
        lora.freeze(model, frozen)
        optimizers = optimizers_of(name, model)
        return model, optimizers, TrainStep(model, optimizers, grad_clip=0.3)

    def run(step: TrainStep, given: list) -> list[tuple[float, float]]:
        return [(result.loss, result.grad_norm) for result in (step(*batch) for batch in given)]

    given = batches(6)
    model, optimizers, step = prepared()
    run(step, given[:3])
    weights = copy.deepcopy(model.state_dict())
    saved = {key: value.clone() for key, value in optim.state_dict(optimizers, names_of(model)).items()}
    assert {key.rpartition("/")[2] for key in saved} == KEYS[name]
    assert {key.rpartition("/")[0] for key in saved} == {n for n, p in model.named_parameters() if p.requires_grad}

    again, restored, resumed = prepared()
    again.load_state_dict(weights)
    optim.load_state_dict(restored, names_of(again), saved)
    assert run(resumed, given[3:]) == run(step, given[3:])
    assert all(torch.equal(*pair) for pair in zip(again.parameters(), model.parameters(), strict=True))
    ours, theirs = (optim.state_dict(o, names_of(m)) for o, m in ((optimizers, model), (restored, again)))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(params=optim.OPTIMIZERS)
def trained(request) -> tuple[str, dict[str, Tensor]]:
    """An optimizer's name, and its state after one step."""
    model = build()
    optimizers = optimizers_of(request.param, model)
    TrainStep(model, optimizers)(*batches(1)[0])
    return request.param, optim.state_dict(optimizers, names_of(model))


def test_load_state_dict_keeps_hyperparameters(trained):
    name, saved = trained
    model = build()
    optimizers = optim.build(name, model.named_parameters(), 0.7, 1e-4, (0.5, 0.6), "cpu")
    before = hyperparameters(optimizers)
    optim.load_state_dict(optimizers, names_of(model), saved)
    assert hyperparameters(optimizers) == before


@each_optimizer
def test_state_dict_before_the_first_step_is_empty(name: str):
    model = build()
    optimizers = optimizers_of(name, model)
    assert optim.state_dict(optimizers, names_of(model)) == {}
    optim.load_state_dict(optimizers, names_of(model), {})
    TrainStep(model, optimizers)(*batches(1)[0])
    assert optim.state_dict(optimizers, names_of(model))


@pytest.mark.parametrize("missing", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_load_state_dict_names_a_parameter_without_state(trained, missing: str):
    name, saved = trained
    some = {key: value for key, value in saved.items() if not key.startswith(missing)}
    for given, model, parameter in ((some, build(), missing), (saved, build(n_layer=3), r"transformer\.h\.2\.")):
        with pytest.raises(ValueError, match=f"does not fit {parameter}"):
            optim.load_state_dict(optimizers_of(name, model), names_of(model), given)


def test_load_state_dict_rejects_the_state_of_another_optimizer(trained):
    name, saved = trained
    model = build()
    (other,) = set(optim.OPTIMIZERS) - {name}
    with pytest.raises(ValueError, match=r"does not fit transformer\."):
        optim.load_state_dict(optimizers_of(other, model), names_of(model), saved)


def test_state_dict_after_a_float16_overflow_in_the_first_step():
    """AdamW has state then, Muon has none."""
    model = build()
    optimizers = optimizers_of("muon", model)
    model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    TrainStep(model, optimizers, dtype=torch.float16)(*batches(1)[0])
    saved = optim.state_dict(optimizers, names_of(model))
    assert saved.keys().isdisjoint(f"{name}/momentum_buffer" for name in HIDDEN)
    again = optimizers_of("muon", model)
    optim.load_state_dict(again, names_of(model), saved)
    assert optim.state_dict(again, names_of(model)).keys() == saved.keys()


def rates(schedule: str, decay_share: float = 0.2) -> list[float]:
    """Rates of 110 steps: 10 of warm-up to 1, and down to 0.1 where the schedule decays."""
    return [optim.learning_rate(schedule, step, 110, 1.0, 0.1, 10, decay_share) for step in range(110)]


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
def test_learning_rate_warms_up_linearly(schedule: str):
    assert rates(schedule)[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert optim.learning_rate(schedule, 5, 6, 1.0, 0.1, 10, 0.2) == pytest.approx(6 / 11)  # a run of warm-up only


def test_learning_rate_decays_by_schedule():
    cosine, wsd = rates("cosine")[10:], rates("wsd")[10:]
    assert (cosine[0], cosine[50]) == pytest.approx((1.0, 0.55))
    assert cosine[-1] == pytest.approx(0.1, abs=0.001)
    assert cosine == sorted(cosine, reverse=True)
    assert rates("constant")[10:] == rates("wsd", decay_share=0.0)[10:] == [1.0] * 100
    assert wsd[:81] == pytest.approx([1.0] * 81)
    assert (wsd[90], wsd[-1]) == pytest.approx((0.55, 0.1 + 0.9 / 20))
