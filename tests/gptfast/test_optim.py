"""Each parameter that is trained has one optimizer, whose state comes back bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, TrainStep, lora, optim
from gptfast.lora import freeze

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
MODELS = {
    "tied": {},
    "untied": {"tie_weights": False},
    "no biases": {"bias": False},
    "no positions, padded": {"position": "none", "pad_vocab_size_to": 64},
}
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
HIDDEN = {f"transformer.h.{block}.{layer}.weight" for block in (0, 1) for layer in MATRICES}


def build(**settings) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), "eager")


def optimizers_of(name: str, model: GPT, weight_decay: float = 0.1) -> list[torch.optim.Optimizer]:
    return optim.build(name, model.named_parameters(), weight_decay, 1e-2, (0.8, 0.95), "cpu")


def names_of(model: GPT) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def held(optimizer: torch.optim.Optimizer, model: GPT) -> list[str]:
    names = names_of(model)
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(31, (count, 4, 9), generator=torch.Generator().manual_seed(1))
    return [(part[:, :-1], part[:, 1:]) for part in tokens]


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_muon_gets_the_matrices_of_blocks_and_adamw_all_else(settings):
    model = build(**settings)
    muon, adamw = optimizers_of("muon", model)
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    assert sorted(held(muon, model)) == sorted(HIDDEN)
    assert sorted(held(muon, model) + held(adamw, model)) == sorted(dict(model.named_parameters()))


@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_adamw_gets_every_parameter_once(settings):
    model = build(**settings)
    (adamw,) = optimizers_of("adamw", model)
    assert sorted(held(adamw, model)) == sorted(dict(model.named_parameters()))


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_matrices_and_embeddings_decay(name: str):
    """And nothing else: biases and norms do not."""
    model = build()
    decays = {
        p: g["weight_decay"] for o in optimizers_of(name, model, 0.3) for g in o.param_groups for p in g["params"]
    }
    assert {n: decays[p] for n, p in model.named_parameters()} == {
        n: 0.3 if p.dim() == 2 else 0.0 for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_settings_reach_the_optimizers(name: str):
    for optimizer in optimizers_of(name, build()):
        assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
        if isinstance(optimizer, torch.optim.AdamW):
            assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
            assert {group["fused"] for group in optimizer.param_groups} == {True}


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_frozen_parameters_have_no_optimizer(name: str):
    model = build()
    frozen = freeze(model, ["transformer.h.0.*", "*.bias", "transformer.wte.*"])
    found = [n for optimizer in optimizers_of(name, model) for n in held(optimizer, model)]
    assert sorted(found + frozen) == sorted(dict(model.named_parameters()))


def test_muon_alone_where_nothing_else_is_trained():
    model = build()
    freeze(model, ["transformer.w?e.*", "*.bias", "*.ln_*"])
    (muon,) = optimizers_of("muon", model)
    assert set(held(muon, model)) == HIDDEN


def test_muon_for_adapters():
    model = build()
    lora.apply(model, 2, 4.0, ["*.attn.*"])
    (muon,) = optimizers_of("muon", model)
    assert {name.rpartition(".")[2] for name in held(muon, model)} == {"lora_a", "lora_b"}
    assert len(held(muon, model)) == 8


@pytest.mark.parametrize("patterns", [["transformer.h.*"], ["*.attn.*.weight", "*.mlp.*.weight"]])
def test_muon_with_nothing_to_do(patterns: list[str]):
    model = build()
    freeze(model, patterns)
    with pytest.raises(ValueError, match="optimizer 'muon' needs"):
        optimizers_of("muon", model)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_the_loss_falls(name: str):
    model = build()
    step = TrainStep(model, optimizers_of(name, model), grad_clip=1.0)
    (batch,) = batches(1)
    losses = [step(*batch).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 1.0
    assert losses == sorted(losses, reverse=True)


def test_muon_and_adamw_are_clipped_by_one_norm():
    """What both are given makes a gradient of the norm asked for."""
    model = build()
    built, given = optimizers_of("muon", model), []

    def look(optimizer, *_):
        divisor = getattr(optimizer, "grad_scale", torch.ones(()))  # which a fused one divides by itself
        given.extend((p.grad / divisor).norm() for group in optimizer.param_groups for p in group["params"])

    for optimizer in built:
        optimizer.register_step_pre_hook(look)
    idx, targets = batches(1)[0]
    plain = copy.deepcopy(model)
    plain(idx, targets)[1].backward()
    result = TrainStep(model, built, grad_clip=0.1)(idx, targets)
    assert result.grad_norm == pytest.approx(float(torch.nn.utils.get_total_norm(p.grad for p in plain.parameters())))
    assert result.grad_norm > 0.5
    assert float(torch.stack(given).norm()) == pytest.approx(0.1, rel=1e-4)
    parts = torch.stack(given) * result.grad_norm / 0.1
    torch.testing.assert_close(parts.sort()[0], torch.stack([p.grad.norm() for p in plain.parameters()]).sort()[0])


KEYS = {"adamw": {"exp_avg", "exp_avg_sq", "step"}, "muon": {"momentum_buffer", "exp_avg", "exp_avg_sq", "step"}}


@pytest.mark.parametrize("frozen", [[], ["transformer.h.0.*", "*.bias"]], ids=["", "frozen"])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_training_goes_on_as_if_it_had_not_ended(name: str, frozen: list[str]):
    """Bit for bit."""
    model = build()
    freeze(model, frozen)
    built = optimizers_of(name, model)
    step = TrainStep(model, built, grad_clip=0.3)
    given = batches(6)
    for batch in given[:3]:
        step(*batch)
    weights = copy.deepcopy(model.state_dict())
    saved = {key: value.clone() for key, value in optim.state_dict(built, names_of(model)).items()}
    assert {key.rpartition("/")[2] for key in saved} == KEYS[name]
    assert {key.rpartition("/")[0] for key in saved} == {n for n, p in model.named_parameters() if p.requires_grad}
    expected = [(result.loss, result.grad_norm) for result in (step(*batch) for batch in given[3:])]

    again = build()
    again.load_state_dict(weights)
    freeze(again, frozen)
    theirs = optimizers_of(name, again)
    optim.load_state_dict(theirs, names_of(again), saved)
    resumed = TrainStep(again, theirs, grad_clip=0.3)
    outcome = [(result.loss, result.grad_norm) for result in (resumed(*batch) for batch in given[3:])]
    assert outcome == expected
    for parameter, other in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, other)
    ours, others = (optim.state_dict(o, names_of(m)) for o, m in ((built, model), (theirs, again)))
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[key], others[key]) for key in ours)


@pytest.fixture(params=optim.OPTIMIZERS)
def trained(request) -> tuple[str, dict[str, Tensor]]:
    """An optimizer's name, and its state after a step."""
    model = build()
    built = optimizers_of(request.param, model)
    TrainStep(model, built)(*batches(1)[0])
    return request.param, optim.state_dict(built, names_of(model))


def test_settings_stay_those_of_the_new_run(trained):
    name, saved = trained
    model = build()
    built = optim.build(name, model.named_parameters(), 0.7, 1e-4, (0.5, 0.6), "cpu")
    before = [{key: value for key, value in g.items() if key != "params"} for o in built for g in o.param_groups]
    optim.load_state_dict(built, names_of(model), saved)
    assert before == [
        {key: value for key, value in g.items() if key != "params"} for o in built for g in o.param_groups
    ]


def test_a_state_from_before_the_first_step_is_none(trained):
    name, _ = trained
    model = build()
    built = optimizers_of(name, model)
    assert optim.state_dict(built, names_of(model)) == {}
    optim.load_state_dict(built, names_of(model), {})
    TrainStep(model, built)(*batches(1)[0])
    assert optim.state_dict(built, names_of(model))


@pytest.mark.parametrize("lacking", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"])
def test_a_state_of_other_settings(trained, lacking: str):
    name, saved = trained
    model = build()
    some = {key: value for key, value in saved.items() if not key.startswith(lacking)}
    with pytest.raises(ValueError, match=rf"does not fit {lacking}"):
        optim.load_state_dict(optimizers_of(name, model), names_of(model), some)
    deeper = build(n_layer=3)
    with pytest.raises(ValueError, match=r"does not fit transformer\.h\.2\."):
        optim.load_state_dict(optimizers_of(name, deeper), names_of(deeper), saved)


def test_a_state_of_another_optimizer(trained):
    name, saved = trained
    model = build()
    other = next(other for other in optim.OPTIMIZERS if other != name)
    with pytest.raises(ValueError, match=r"does not fit transformer"):
        optim.load_state_dict(optimizers_of(other, model), names_of(model), saved)


def test_a_float16_gradient_that_overflows_in_the_first_step():
    """Muon has no state after it, and AdamW has."""
    model = build()
    built = optimizers_of("muon", model)
    model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * float("inf"))
    TrainStep(model, built, dtype=torch.float16)(*batches(1)[0])
    saved = optim.state_dict(built, names_of(model))
    assert saved.keys().isdisjoint(f"{name}/momentum_buffer" for name in HIDDEN)
    again = optimizers_of("muon", model)
    optim.load_state_dict(again, names_of(model), saved)
    assert optim.state_dict(again, names_of(model)).keys() == saved.keys()
