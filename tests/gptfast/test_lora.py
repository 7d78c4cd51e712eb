"""Adapters change nothing when new, are alone in being trained, and leave a plain GPT when merged."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gptfast import GPT, GPTConfig, TrainStep, lora
from tests.support.oracle import DEVICE

CONFIG = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
RANK, ALPHA = 2, 6.0
ALL = ["transformer.h.*"]
LAYERS = [
    f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
# the head is a layer of its own, whose rows of padding are in no file
UNTIED = {"tie_weights": False, "pad_vocab_size_to": 16}
CASES = {"tied": ({}, ALL), "no bias": ({"bias": False}, ALL), "untied, padded": (UNTIED, [*ALL, "lm_head"])}
cases = pytest.mark.parametrize(("settings", "targets"), CASES.values(), ids=CASES)


def build(backend: str = "eager", seed: int = 0, **settings) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), backend).to(DEVICE)


def adapted(backend: str = "eager", targets: list[str] = ALL, random: bool = False, **settings) -> GPT:
    """With adapters, drawn at random if asked to instead of B = 0."""
    model = build(backend, **settings)
    lora.apply(model, RANK, ALPHA, targets)
    if random:
        lora.load_adapters(model, {name: 0.1 * torch.randn(t.shape) for name, t in lora.adapters(model).items()})
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def logits(model: GPT) -> Tensor:
    return model.eval()(*batch())[0]  # [4, 8, 31]


def train(model: GPT, steps: int = 4, **settings) -> list[float]:
    """The losses."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), DEVICE.type)
    step = TrainStep(model.train(), optimizer, **settings)
    return [step(*batch()).loss for _ in range(steps)]


def change(model: GPT, layer: str) -> Tensor:
    """What the adapter of a layer adds to its weight, by the paper's formula."""
    tensors = lora.adapters(model)
    return (ALPHA / RANK) * tensors[f"{layer}.lora_b"] @ tensors[f"{layer}.lora_a"]


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(
    ("backend", "case"), [*(("eager", case) for case in CASES), ("triton", "tied"), ("triton", "untied, padded")]
)
def test_new_adapters_change_nothing(backend: str, case: str):
    settings, targets = CASES[case]
    plain, model = build(backend, **settings), build(backend, **settings)
    assert not lora.is_applied(model)
    assert lora.apply(model, RANK, ALPHA, targets) == [*LAYERS, *targets[1:]]
    assert lora.is_applied(model)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(model.train()(*batch())[1], plain.train()(*batch())[1])


def test_matrices_begin_as_in_the_paper():
    tensors = lora.adapters(adapted(n_embd=128, targets=["*.h.0.*"]))
    assert list(tensors) == [f"{layer}.{matrix}" for layer in LAYERS[:4] for matrix in ("lora_a", "lora_b")]
    a, b = tensors["transformer.h.0.mlp.c_fc.lora_a"], tensors["transformer.h.0.mlp.c_fc.lora_b"]
    assert (a.shape, b.shape) == ((RANK, 128), (512, RANK))
    assert 0.9 * 128**-0.5 < a.abs().max() <= 128**-0.5  # He's bound for a leak of sqrt(5)
    assert not b.any()


def test_only_the_adapters_are_parameters_to_train():
    model = adapted(targets=["*.mlp.c_fc"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = "transformer.h.{}.mlp.c_fc.parametrizations.weight.0.lora_{}"
    assert trained == {inside.format(layer, matrix) for layer in range(2) for matrix in "ab"}


def test_a_layer_and_its_gradients_are_those_of_the_formula():
    """y = x (W + s B A)^T, dA = s B^T G and dB = s G A^T, with G the gradient of the weight."""
    model = adapted(random=True).double()
    layer = model.transformer.h[0].attn.c_attn
    adapter = layer.parametrizations.weight[0]
    x, dy = (
        torch.randn(5, 32, dtype=torch.float64, device=DEVICE),
        torch.randn(5, 96, dtype=torch.float64, device=DEVICE),
    )
    y = layer(x)
    y.backward(dy)
    scale, a, b = ALPHA / RANK, adapter.lora_a.detach(), adapter.lora_b.detach()
    weight = (layer.parametrizations.weight.original + scale * b @ a).requires_grad_()
    expected = F.linear(x, weight, layer.bias)
    expected.backward(dy)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(adapter.lora_a.grad, scale * b.T @ weight.grad)
    torch.testing.assert_close(adapter.lora_b.grad, scale * weight.grad @ a.T)
    assert layer.parametrizations.weight.original.grad is None


@cases
def test_training_changes_the_adapters_alone(settings: dict, targets: list[str]):
    model = adapted(targets=targets, **settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not name.endswith(("lora_a", "lora_b")), name
    if "lm_head" in targets:
        assert not model.lm_head.weight[31:].any()  # padding stays what it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_with_triton_kernels(dtype: torch.dtype):
    """The feed-forward and the loss take weights, not layers: those of the adapted layers."""
    outcomes, before = [], build(n_layer=1, **UNTIED).state_dict()
    for backend in ("eager", "triton"):
        model = adapted(backend, [*ALL, "lm_head"], random=True, n_layer=1, **UNTIED)
        losses = train(model, steps=2, dtype=dtype)
        outcomes.append({"losses": torch.tensor(losses), **lora.adapters(model)})
        kept = {n.replace(".parametrizations.weight.original", ".weight"): p for n, p in model.named_parameters()}
        assert all(torch.equal(kept[n][: len(w)], w) for n, w in before.items())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=tolerance, atol=tolerance)
    lora.merge(model)
    assert train(model, steps=1)[0] < losses[0]


@cases
def test_merging_leaves_a_plain_gpt(settings: dict, targets: list[str]):
    plain, model = build(**settings), adapted(targets=targets, **settings)
    train(model)
    unmerged, state = logits(model), lora.merged_state_dict(model)
    changes = {f"{layer}.weight": change(model, layer) for layer in [*LAYERS, *targets[1:]]}
    lora.merge(model)
    assert not lora.is_applied(model)
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(plain), unmerged, rtol=1e-2, atol=1e-2)
    assert_same_tensors(model.state_dict(), state)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(state[name], weight + changes.get(name, 0.0))
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())
    losses = train(model)  # all of it now
    assert losses[-1] < losses[0]
    lora.apply(model, RANK, ALPHA, targets)


@cases
def test_merged_weights_load_into_a_new_gpt(settings: dict, targets: list[str]):
    model = adapted(targets=targets, random=True, **settings)
    unmerged, state = logits(model), lora.merged_state_dict(model)
    other = build(seed=1, **settings | {"pad_vocab_size_to": 1})
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other), unmerged, rtol=1e-5, atol=1e-5)
    assert_same_tensors(state, other.state_dict())
    assert lora.is_applied(model)
    assert torch.equal(logits(model), unmerged)


def test_merged_weights_of_a_model_without_adapters_are_its_own():
    model = build(**UNTIED)
    assert_same_tensors(lora.merged_state_dict(model), model.state_dict())


def test_merging_keeps_the_parameters_that_an_optimizer_holds():
    model = build()
    before = [id(p) for p in model.parameters()]
    lora.apply(model, RANK, ALPHA, ALL)
    lora.merge(model)
    assert [id(p) for p in model.parameters()] == before


def test_adapters_of_a_copy_are_its_own():
    """A merge as well: both share the classes that parametrize made."""
    model = adapted(random=True)
    expected = logits(model)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    lora.merge(first)
    train(second)
    for other in (model, first):
        torch.testing.assert_close(logits(other), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(second), expected, rtol=1e-2, atol=1e-2)
    lora.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    assert lora.is_applied(second)


def test_activation_checkpointing_changes_nothing():
    outcomes = []
    for enabled in (False, True):
        model = adapted()
        model.set_activation_checkpointing(enabled)
        outcomes.append((train(model), lora.adapters(model)))
    assert outcomes[0][0] == outcomes[1][0]
    assert_same_tensors(outcomes[0][1], outcomes[1][1])


def test_products_in_bfloat16_and_adapters_in_float32():
    model, exact = adapted(random=True), adapted(random=True)
    layer = model.transformer.h[0].mlp.c_fc
    alone = layer.weight.detach()  # a graph that is alive ties gradients to its stream, which a capture cannot wait for
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, alone)
    losses, expected = train(model, dtype=torch.bfloat16), train(exact)
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_compiled_step_is_one_graph_and_the_same(monkeypatch):
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    expected_model, model = adapted(n_layer=1), adapted(n_layer=1)
    expected = train(expected_model, dtype=torch.bfloat16)
    losses = train(model, compiled=True, graph=False, dtype=torch.bfloat16)
    assert graphs.frame_count == 1
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[-1] < losses[0] - 0.05
    torch.compiler.reset()


@pytest.mark.parametrize("padding", [1, 16, 64])
def test_adapters_are_saved_and_loaded_alone(tmp_path, padding: int):
    """Between paddings as well: files are of the vocabulary."""
    targets = [*ALL, "lm_head"]
    model = adapted(targets=targets, **UNTIED)
    train(model)
    torch.save(lora.adapters(model), tmp_path / "adapters.pt")
    other = build(seed=1, tie_weights=False, pad_vocab_size_to=padding)
    other.load_state_dict(build(**UNTIED).state_dict())
    lora.apply(other, RANK, ALPHA, targets)
    lora.load_adapters(other, torch.load(tmp_path / "adapters.pt"))
    assert_same_tensors(lora.adapters(other), lora.adapters(model))
    assert lora.adapters(other)["lm_head.lora_b"].shape == (31, RANK)
    assert not other.lm_head.weight[31:].any()
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_a_model_without_values():
    """Sizes can be had before memory is."""
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2"), "eager")
        lora.apply(model, 8, 16.0, ["*.attn.c_attn"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * 8 * (768 + 3 * 768)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.5}, "rank must be an integer of at least 1, got 2.5"),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ({"alpha": -1.0}, "alpha must be positive and finite, got -1.0"),
        ({"alpha": float("inf")}, "alpha must be positive and finite, got inf"),
        ({"alpha": float("nan")}, "alpha must be positive and finite, got nan"),
        (
            {"targets": ["*.attn.*", "*.ln_1"]},
            r"no linear layer matches '\*\.ln_1'; accepted: names such as transformer\.h\.0\.attn\.c_attn, ",
        ),
        ({"targets": []}, r"targets must have .*, got none"),
        ({"targets": "*"}, r"patterns must be a sequence of strings, got '\*'; accepted: \['\*'\]"),
        (
            {"targets": ["*.attn.*", "lm_*"]},
            r"targets \['\*\.attn\.\*', 'lm_\*'\] match lm_head, which is the token embedding \(tie_weights=True\)",
        ),
    ],
)
def test_bad_settings_leave_the_model_as_it_was(arguments: dict, message: str):
    model = build()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lora.apply(model, **{"rank": RANK, "alpha": ALPHA, "targets": ALL} | arguments)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_adapters_are_added_once():
    model = adapted(targets=["*.mlp.*"])
    with pytest.raises(ValueError, match=r"has adapters already, such as on transformer\.h\.0\.mlp\.c_fc; merge"):
        lora.apply(model, RANK, ALPHA, ["*.attn.*"])


def test_nothing_to_merge():
    with pytest.raises(ValueError, match=r"no adapters to merge"):
        lora.merge(build())


def test_adapters_that_do_not_fit():
    model = adapted(targets=["*.attn.*"])
    tensors = {name: torch.ones_like(tensor) for name, tensor in lora.adapters(model).items()}
    second, third = list(tensors)[1:3]
    cases = {
        f"adapter {second} is missing from the 6 tensors given": {
            name: tensor for name, tensor in tensors.items() if name not in (second, third)
        },
        rf"adapter {second} has shape \(2, 96\), the model's has \(96, 2\)": tensors | {second: tensors[second].T},
        r"adapter lm_head\.lora_a is unknown to the model; accepted: transformer\.h\.0\.attn\.c_attn\.lora_a, ": tensors
        | {"lm_head.lora_a": tensors[third]},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            lora.load_adapters(model, given)
    assert not lora.adapters(model)[second].any()
    plain = build()
    assert lora.adapters(plain) == {}
    with pytest.raises(ValueError, match=r"c_attn\.lora_a is unknown to the model; add adapters"):
        lora.load_adapters(plain, tensors)
