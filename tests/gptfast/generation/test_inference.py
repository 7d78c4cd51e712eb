"""Models for generation say what the models they are made of say."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from gptfast import GPT, GPTConfig
from gptfast.generation.inference import FeedForward, PackedLinear, for_decoding
from gptfast.training import lora
from kernels import packed, reference

MODELS = {
    "pre-norm": {},
    "untied without bias": {"tie_weights": False, "bias": False},
    "post-norm": {"norm_position": "post", "activation": "relu"},
    "sinusoidal": {"position": "sinusoidal", "activation": "gelu"},
    "padded": {"pad_vocab_size_to": 32},
}


def build(dtype: torch.dtype = torch.float32, **changes) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=32, init_std=0.3, **changes)
    model = GPT(config, backend="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def tokens(batch: int = 3, length: int = 12) -> Tensor:
    return torch.randint(23, (batch, length), generator=torch.Generator().manual_seed(0))


def products(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


def logits(model: GPT, idx: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model.transformer(idx))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products_are_those_of_the_model(dtype, changes):
    model, idx = build(dtype, **changes), tokens()
    expected = logits(build(torch.float64, **changes), idx)
    found = for_decoding(model)
    assert len(products(found)) == 4 * 2 + 1
    error, allowed = (logits(m, idx).double() - expected for m in (found, model))
    assert found is not model
    assert products(model) == []
    assert error.abs().max() <= 2.0 * allowed.abs().max() + 1e-5
    assert logits(found, idx).dtype == dtype


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [(), (1,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product(dtype, rows, activation, bias):
    generator = torch.Generator().manual_seed(0)
    x, weight, b = (torch.randn(*shape, generator=generator) for shape in ((*rows, 24), (40, 24), (40,)))
    x, weight, b = x.to(dtype), (weight / 5).to(dtype), b.to(dtype) if bias else None
    y = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    expected = y if activation is None else reference.activate(y, activation)
    found = packed.packed_linear(x, packed.pack(weight), b, activation)
    assert found.dtype == dtype
    # the rounding of the result, and of float32 sums
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_weights_in_float32_are_not_copied():
    model = build()
    found = for_decoding(model, 1)
    assert found.lm_head._weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert found.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert isinstance(found.transformer.h[0].mlp, FeedForward)


def test_nothing_is_packed_for_a_few_tokens():
    model = build(torch.bfloat16)
    assert for_decoding(model, 31) is model
    assert for_decoding(model, 32) is not model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_what_cannot_be_packed_stays(dtype):
    model = build(dtype)
    assert for_decoding(model) is model


def test_what_is_packed_is_not_packed_again():
    model = for_decoding(build())
    assert for_decoding(model) is model


def test_modules_with_hooks_stay():
    model, idx = build(), tokens()
    seen = []
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda *arguments: seen.append("c_attn"))
    model.transformer.h[1].mlp.register_forward_pre_hook(lambda *arguments: seen.append("mlp"))
    found = for_decoding(model)
    torch.testing.assert_close(logits(found, idx), logits(build(), idx), rtol=1e-5, atol=1e-5)
    assert seen == ["c_attn", "mlp"]


def test_products_are_in_the_dtype_of_autocast():
    model, idx = build(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        found = for_decoding(model)
        expected = logits(model, idx)
        assert logits(found, idx).dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(logits(found, idx), expected, rtol=0.1, atol=0.1)


def test_adapters_are_merged():
    model, idx = build(), tokens()
    lora.apply(model, rank=2, alpha=2.0, targets=["transformer.*"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "parametrizations" in name:
                parameter.normal_(std=0.3)
    found = for_decoding(model)
    assert len(products(found)) == 9
    assert (logits(found, idx) - logits(build(), idx)).abs().max() > 0.1
    torch.testing.assert_close(logits(found, idx), logits(model, idx), rtol=1e-4, atol=1e-4)


def test_generation_uses_packed_products(monkeypatch):
    model, idx = build(), tokens(length=5)
    seen = []
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: seen.append(1) or forward(self, x))
    found = model.generate(idx, 4, temperature=0)
    assert len(seen) == 9 * 4
    monkeypatch.setattr("gptfast.generation.inference.packed.can_pack", lambda weight, dtype: False)
    assert torch.equal(model.generate(idx, 4, temperature=0), found)
    assert len(seen) == 9 * 4
