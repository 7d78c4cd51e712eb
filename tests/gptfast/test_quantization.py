"""Packed and quantized models give the logits of the models they are made from."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

import kernels
from gptfast import lora
from gptfast.quantization import Int8Linear, PackedLinear, pack, quantize
from kernels import onednn, reference
from tests.support.generation import cpu_gpt, logits, prompts

IDX = prompts(12, 12, 12).cpu()

MODELS = {
    "pre-norm": {},
    "untied without bias": {"tie_weights": False, "bias": False},
    "post-norm": {"norm_position": "post", "activation": "relu"},
    "sinusoidal": {"position": "sinusoidal", "activation": "gelu"},
    "padded": {"pad_vocab_size_to": 32},
}


@pytest.fixture(autouse=True)
def pack_small_weights(monkeypatch):
    monkeypatch.setattr("gptfast.quantization._MIN_BYTES", 0)


def products(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_model_is_as_exact_as_the_model(dtype, changes):
    model = cpu_gpt(dtype, **changes)
    expected = logits(cpu_gpt(torch.float64, **changes), IDX)
    found = pack(model)
    assert len(products(found)) == 4 * 2 + 1
    error, allowed = (logits(m, IDX).double() - expected for m in (found, model))
    assert found is not model
    assert products(model) == []
    assert error.abs().max() <= 2.0 * allowed.abs().max() + 1e-5
    assert logits(found, IDX).dtype == dtype


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [(), (1,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_linear_is_as_exact_as_its_dtype(dtype, rows, activation, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(*shape, generator=generator) for shape in ((*rows, 24), (40, 24), (40,)))
    x, weight, b = x.to(dtype), (weight / 5).to(dtype), b.to(dtype) if bias else None
    y = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    expected = y if activation is None else reference.activate(y, activation)
    found = onednn.packed_linear(x, onednn.pack(weight), b, activation)
    assert found.dtype == dtype
    # rounding of the result, and of float32 sums
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_float32_weights_are_shared():
    model = cpu_gpt()
    found = pack(model)
    assert found.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert found.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert isinstance(found.transformer.h[0].mlp, nn.Sequential)


def test_small_weights_are_not_packed(monkeypatch):
    monkeypatch.setattr("gptfast.quantization._MIN_BYTES", 4 * 32 * 128)
    model, idx = cpu_gpt(), IDX
    found = pack(model)
    assert len(products(found)) == 4  # the feed-forwards'
    torch.testing.assert_close(logits(found, idx), logits(model, idx), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("gptfast.quantization._MIN_BYTES", 4 * 32 * 128 + 1)
    assert pack(cpu_gpt()) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_not_packed(dtype):
    assert pack(cpu_gpt(dtype)) is None


def test_modules_with_hooks_are_not_packed():
    model, idx = cpu_gpt(), IDX
    seen = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *arguments: seen.append("c_attn"))
    model.transformer.h[1].mlp.register_forward_pre_hook(lambda *arguments: seen.append("mlp"))
    found = pack(model)
    torch.testing.assert_close(logits(found, idx), logits(cpu_gpt(), idx), rtol=1e-5, atol=1e-5)
    assert seen == ["c_attn", "mlp"]


def test_packed_layers_compute_in_the_dtype_of_autocast():
    model, idx = cpu_gpt(), IDX
    with torch.autocast("cpu", torch.bfloat16):
        found = pack(model)
        expected = logits(model, idx)
        assert logits(found, idx).dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(logits(found, idx), expected, rtol=0.1, atol=0.1)


def test_packing_merges_adapters():
    model, idx = cpu_gpt(), IDX
    lora.apply(model, rank=2, alpha=2.0, targets=["transformer.*"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "parametrizations" in name:
                parameter.normal_(std=0.3)
    found = pack(model)
    assert len(products(found)) == 9
    assert (logits(found, idx) - logits(cpu_gpt(), idx)).abs().max() > 0.1
    torch.testing.assert_close(logits(found, idx), logits(model, idx), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_model_has_rounded_weights(dtype, changes):
    model = cpu_gpt(dtype, **changes)
    rounded = cpu_gpt(dtype, **changes)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, nn.Linear):
                integers, scale = kernels.quantize_int8(module.weight)
                # a new parameter, because a tied one would round the embedding too
                module.weight = nn.Parameter((integers * scale[:, None]).double())
    rounded.lm_head.weight.requires_grad_(False)
    found, expected = logits(quantize(model), IDX).double(), logits(rounded.double(), IDX)
    assert (found - expected).norm() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * expected.norm()
    before = logits(cpu_gpt(torch.float64, **changes), IDX)
    assert 1e-4 * before.norm() < (expected - before).norm() < 0.05 * before.norm()


def test_quantize_changes_a_copy():
    model, idx = cpu_gpt(), IDX
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = quantize(model).to(torch.bfloat16)
    assert quantized.transformer.wte.weight.dtype == torch.bfloat16
    assert {type(module) for module in quantized.modules()} >= {Int8Linear, nn.Sequential}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.generate(idx, 3, temperature=0), cpu_gpt().generate(idx, 3, temperature=0))


def test_a_quantized_model_computes_its_loss_eagerly():
    model, idx = cpu_gpt(), IDX
    with torch.no_grad():
        expected = model(idx, idx)[1]
        for backend in ("auto", "eager"):
            model.set_backend(backend)
            quantized = quantize(model)
            assert quantized.backend["loss"] == "eager"
            assert quantized(idx, idx)[1] == pytest.approx(expected.item(), rel=0.02)


def test_a_quantized_model_generates_as_without_a_cache():
    model, idx = quantize(cpu_gpt()), IDX[:, :5]
    found = model.generate(idx, 12, temperature=0)  # past the window
    for _ in range(12):
        with torch.no_grad():
            idx = torch.cat((idx, model(idx[:, -12:])[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, idx)


def test_quantized_layers_take_a_quarter_of_the_memory():
    model = cpu_gpt(n_embd=256)
    quantized = quantize(model)
    products = [module for module in quantized.modules() if isinstance(module, Int8Linear)]
    held = sum(module.weight.nbytes + module.scale.nbytes for module in products)
    before = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    assert held < 0.26 * before


def test_weights_that_are_not_finite_are_refused():
    model = cpu_gpt()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"weight.*row 3"):
        quantize(model)
