"""New adapters change nothing, only they are trained, and a merge leaves a plain GPT. Frozen parameters stay."""

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
# the head is a layer then, and files leave its padded rows out
UNTIED = {"tie_weights": False, "pad_vocab_size_to": 16}
CASES = {"tied": ({}, ALL), "no bias": ({"bias": False}, ALL), "untied, padded": (UNTIED, [*ALL, "lm_head"])}
cases = pytest.mark.parametrize(("settings", "targets"), CASES.values(), ids=CASES)


def build(backend: str = "eager", seed: int = 0, **settings) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**vars(CONFIG), **settings}), backend).to(DEVICE)


def adapted(backend: str = "eager", targets: list[str] = ALL, random: bool = False, **settings) -> GPT:
    """A model with adapters, with random B instead of zeros if `random`."""
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
    """Train on one batch; return the losses."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), DEVICE.type)
    step = TrainStep(model.train(), optimizer, **settings)
    return [step(*batch()).loss for _ in range(steps)]


def change(model: GPT, layer: str) -> Tensor:
    """The update of a layer's weight by the paper's formula."""
    tensors = lora.adapters(model)
    return (ALPHA / RANK) * tensors[f"{layer}.lora_b"] @ tensors[f"{layer}.lora_a"]


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(
    ("backend", "case"), [*(("eager", case) for case in CASES), ("triton", "tied"), ("triton", "untied, padded")]
)
def test_apply_leaves_outputs_as_they_were(backend: str, case: str):
    settings, targets = CASES[case]
    plain, model = build(backend, **settings), build(backend, **settings)
    assert not lora.is_applied(model)
    assert lora.apply(model, RANK, ALPHA, targets) == [*LAYERS, *targets[1:]]
    assert lora.is_applied(model)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(model.train()(*batch())[1], plain.train()(*batch())[1])


def test_apply_initialises_as_the_paper_does():
    tensors = lora.adapters(adapted(n_embd=128, targets=["*.h.0.*"]))
    assert list(tensors) == [f"{layer}.{matrix}" for layer in LAYERS[:4] for matrix in ("lora_a", "lora_b")]
    a, b = tensors["transformer.h.0.mlp.c_fc.lora_a"], tensors["transformer.h.0.mlp.c_fc.lora_b"]
    assert (a.shape, b.shape) == ((RANK, 128), (512, RANK))
    assert 0.9 * 128**-0.5 < a.abs().max() <= 128**-0.5  # He et al.'s bound for a=sqrt(5)
    assert not b.any()


def test_adapted_layer_and_its_gradients_follow_the_formula():
    """y = x (W + s B A)^T, dA = s B^T G and dB = s G A^T, with G the gradient of the weight."""
    model = adapted(random=True).double()
    layer = model.transformer.h[0].attn.c_attn
    adapter = layer.parametrizations.weight[0]
    x, dy = (torch.randn(5, width, dtype=torch.float64, device=DEVICE) for width in (32, 96))
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
def test_training_changes_only_adapters(settings: dict, targets: list[str]):
    model = adapted(targets=targets, **settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is not name.endswith(("lora_a", "lora_b")), name
    if "lm_head" in targets:
        assert not model.lm_head.weight[31:].any()  # padding stays zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_with_triton_equals_eager(dtype: torch.dtype):
    """The operators of the feed-forward and the loss read adapted weights past their layers."""
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
def test_merge_leaves_a_plain_gpt(settings: dict, targets: list[str]):
    plain, model = build(**settings), build(**settings)
    with pytest.raises(ValueError, match="no adapters"):
        lora.merge(model)
    parameters = [id(p) for p in model.parameters()]
    lora.apply(model, RANK, ALPHA, targets)
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
    assert [id(p) for p in model.parameters()] == parameters
    assert all(p.requires_grad for p in model.parameters())
    losses = train(model)  # all parameters
    assert losses[-1] < losses[0]
    lora.apply(model, RANK, ALPHA, targets)


@cases
def test_merged_state_dict_loads_into_a_new_gpt(settings: dict, targets: list[str]):
    model = adapted(targets=targets, random=True, **settings)
    unmerged, state = logits(model), lora.merged_state_dict(model)
    other = build(seed=1, **settings | {"pad_vocab_size_to": 1})
    assert_same_tensors(lora.merged_state_dict(other), other.state_dict())
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other), unmerged, rtol=1e-5, atol=1e-5)
    assert_same_tensors(state, other.state_dict())
    assert lora.is_applied(model)
    assert torch.equal(logits(model), unmerged)


def test_deepcopy_has_separate_adapters():
    """Copies share the classes that parametrize makes; a merge of one leaves the others."""
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


def test_activation_checkpointing_is_bitwise_the_same():
    outcomes = []
    for enabled in (False, True):
        model = adapted()
        model.set_activation_checkpointing(enabled)
        outcomes.append((train(model), lora.adapters(model)))
    assert outcomes[0][0] == outcomes[1][0]
    assert_same_tensors(outcomes[0][1], outcomes[1][1])


def test_bfloat16_autocast_leaves_adapters_in_float32():
    model, exact = adapted(random=True), adapted(random=True)
    layer = model.transformer.h[0].mlp.c_fc
    alone = layer.weight.detach()  # a live autograd graph ties gradients to its stream, which breaks a capture
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, alone)
    losses, expected = train(model, dtype=torch.bfloat16), train(exact)
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.01)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_compiled_step_is_one_graph(monkeypatch):
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
def test_load_adapters_between_paddings(tmp_path, padding: int):
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


def test_apply_on_the_meta_device():
    with torch.device("meta"):
        model = GPT(GPTConfig.preset("gpt2"), "eager")
        lora.apply(model, 8, 16.0, ["*.attn.c_attn"])
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * 8 * (768 + 3 * 768)


BAD_ARGUMENTS = [
    ({"rank": 0}, "rank.* 0"),
    ({"rank": 2.5}, r"rank.* 2\.5"),
    *(({"alpha": alpha}, f"alpha.* {alpha}") for alpha in (0.0, -1.0, float("inf"), float("nan"))),
    ({"targets": ["*.attn.*", "*.ln_1"]}, r"no linear layer matches '\*\.ln_1'.* transformer\.h\.0\.attn\.c_attn"),
    ({"targets": []}, "targets.* none"),
    ({"targets": "*"}, r"patterns .* '\*'"),
    ({"targets": ["*.attn.*", "lm_*"]}, r"targets \['\*\.attn\.\*', 'lm_\*'\] match lm_head"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_apply_rejects_bad_arguments_and_changes_nothing(arguments: dict, message: str):
    model = build()
    names = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lora.apply(model, **{"rank": RANK, "alpha": ALPHA, "targets": ALL} | arguments)
    assert list(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_apply_rejects_a_model_with_adapters():
    model = adapted(targets=["*.mlp.*"])
    with pytest.raises(ValueError, match=r"adapters already.* transformer\.h\.0\.mlp\.c_fc"):
        lora.apply(model, RANK, ALPHA, ["*.attn.*"])


def test_load_adapters_rejects_what_does_not_fit():
    model, plain = adapted(targets=["*.attn.*"]), build()
    tensors = {name: torch.ones_like(tensor) for name, tensor in lora.adapters(model).items()}
    second, third = list(tensors)[1:3]
    for target, given, message in (
        (model, {n: t for n, t in tensors.items() if n not in (second, third)}, f"adapter {second}: got none"),
        (model, tensors | {second: tensors[second].T}, rf"adapter {second}: got \(2, 96\), .* \(96, 2\)"),
        (model, tensors | {"lm_head.lora_a": tensors[third]}, r"adapter lm_head\.lora_a: got \(2, 32\), .* none"),
        (plain, tensors, r"c_attn\.lora_a: got \(2, 32\), .* none"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.load_adapters(target, given)
    assert not lora.adapters(model)[second].any()
    assert lora.adapters(plain) == {}


PATTERNS = [["transformer.h.[0-1].*"], ["transformer.w?e.weight"], ["*.bias", "*.mlp.*"], ["lm_head.weight"], []]


@pytest.mark.parametrize(
    ("backend", "patterns"), [*(("eager", patterns) for patterns in PATTERNS), ("triton", PATTERNS[2])]
)
def test_freeze_keeps_parameters_from_training(backend: str, patterns: list[str]):
    model, before = build(backend), build()
    frozen = lora.freeze(model, patterns)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    train(model, steps=2)
    same = {n for n, p in model.named_parameters() if torch.equal(p, before.get_parameter(n))}
    assert same == set(frozen)


def test_freeze_returns_names_in_the_order_of_the_model():
    frozen = ["transformer.wte.weight"]
    frozen += [f"transformer.h.{i}.ln_2.{name}" for i in (1, 2) for name in ("weight", "bias")]
    patterns = ["transformer.h.[1-2].ln_2.*", "transformer.wte.*", "transformer.h.2.ln_2.bias"]
    assert lora.freeze(build(n_layer=3), patterns) == frozen


@pytest.mark.parametrize("pattern", ["transformer.wte.weight", "lm_head.weight", "*[te].weight"])
def test_freeze_matches_a_tied_weight_by_either_name(pattern: str):
    model = build(position="none")
    assert "transformer.wte.weight" in lora.freeze(model, [pattern])
    assert not model.lm_head.weight.requires_grad
    untied = build(tie_weights=False)
    assert lora.freeze(untied, ["lm_head.weight"]) == ["lm_head.weight"]
    assert untied.transformer.wte.weight.requires_grad


def test_freeze_adds_to_what_is_frozen():
    model = build()
    lora.freeze(model, ["transformer.h.0.*"])
    assert lora.freeze(model, ["transformer.h.0.ln_1.*"]) == [f"transformer.h.0.ln_1.{n}" for n in ("weight", "bias")]
    lora.freeze(model, ["transformer.h.1.*"])
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    assert left == [f"transformer.{n}" for n in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")]
    lora.freeze(model, ["*.weight"])
    with pytest.raises(ValueError, match=r"'\*\.bias' leave nothing to train"):
        lora.freeze(model, ["*.bias"])
    assert model.transformer.ln_f.bias.requires_grad


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["transformer.wte.*", "h.0.*"], r"no parameter matches 'h\.0\.\*'.* transformer\.wte\.weight"),
        (["Transformer.*"], r"no parameter matches 'Transformer\.\*'"),
        (["transformer.*"], r"'transformer\.\*' leave nothing to train"),
        (["*.weight", "*.bias"], r"'\*\.weight', '\*\.bias' leave nothing to train"),
        ("*.bias", r"patterns .* '\*\.bias'"),
    ],
)
def test_freeze_rejects_bad_patterns_and_changes_nothing(patterns, message: str):
    model = build()
    with pytest.raises(ValueError, match=message):
        lora.freeze(model, patterns)
    assert all(p.requires_grad for p in model.parameters())
