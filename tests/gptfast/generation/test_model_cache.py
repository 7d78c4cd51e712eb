"""The packed copy of a model is made once, follows changes of the model and is freed with it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch

from gptfast import GPT, lora, quantize
from gptfast.generation.model_cache import for_decoding
from gptfast.quantization import PackedLinear, pack
from tests.support.generation import cpu_gpt, logits, prompts

IDX = prompts(12, 12, 12).cpu()


@pytest.fixture(autouse=True)
def pack_small_weights(monkeypatch):
    monkeypatch.setattr("gptfast.quantization._MIN_BYTES", 0)


def test_few_tokens_are_not_worth_packing():
    model = cpu_gpt(torch.bfloat16)
    assert for_decoding(model, 31) is model
    assert for_decoding(model, 32) is not model


def test_an_eager_model_is_not_packed():
    model = cpu_gpt()
    model.set_backend("eager")
    assert for_decoding(model) is model


def test_a_packed_model_is_not_packed_again():
    model = for_decoding(cpu_gpt())
    assert for_decoding(model) is model


def test_generate_uses_the_packed_copy(monkeypatch):
    model, idx = cpu_gpt(), IDX[:, :5]
    seen = []
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: seen.append(1) or forward(self, x))
    found = model.generate(idx, 4, temperature=0)
    assert len(seen) == 9 * 4
    monkeypatch.setattr("gptfast.quantization.onednn.can_pack", lambda weight, dtype: False)
    assert torch.equal(cpu_gpt().generate(idx, 4, temperature=0), found)
    assert len(seen) == 9 * 4


def test_packed_copy_is_made_once_and_freed_with_its_model():
    model = cpu_gpt(torch.bfloat16)
    model.itself = [model]  # an attribute that refers back
    packed = for_decoding(model)
    assert for_decoding(model) is packed
    assert for_decoding(cpu_gpt(torch.bfloat16)) is not packed
    freed = [weakref.ref(model), weakref.ref(packed)]
    del model, packed
    gc.collect()
    assert [reference() for reference in freed] == [None, None]


def _change_by_optimizer(model: GPT) -> None:
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    model(IDX, IDX)[1].backward()
    optimizer.step()


def _change_by_load(model: GPT) -> None:
    model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()})


def _change_in_place(model: GPT) -> None:
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[3, 2] += 1.0


def _change_by_hook(model: GPT) -> None:
    model.transformer.h[0].attn.c_attn.register_forward_hook(lambda module, given, result: 2 * result)


def _change_memory(model: GPT) -> None:
    model.lm_head.weight.data = -model.lm_head.weight.data


def _change_strides(model: GPT) -> None:
    weight = model.transformer.h[0].attn.c_proj.weight
    weight.data = weight.data.t()


def _change_module(model: GPT) -> None:
    model.transformer.h[0].mlp = cpu_gpt(model.transformer.wte.weight.dtype, init_std=0.5).transformer.h[0].mlp


@pytest.mark.parametrize(
    "change",
    [_change_by_optimizer, _change_by_load, _change_in_place, _change_by_hook, _change_memory, _change_strides,
     _change_module, lambda model: model.crop_block_size(11), lambda model: model.set_residual_dtype(torch.float64),
     lambda model: lora.apply(model, rank=2, alpha=2.0, targets=["transformer.*"])],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_copy_follows_changes_of_its_model(dtype, change):
    model, idx = cpu_gpt(dtype), IDX[:, :11]
    before = for_decoding(model)
    change(model)
    after = for_decoding(model)
    assert after is not before
    torch.testing.assert_close(logits(after, idx), logits(model, idx), rtol=0.05, atol=0.1)
    assert for_decoding(model) is after


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"]
)
@pytest.mark.parametrize("index", [np.s_[:], np.s_[4], np.s_[:, 6]], ids=["all", "a row", "a column"])
@pytest.mark.parametrize("autocast", [True, False])
def test_packed_copy_follows_writes_through_data(autocast, index, name):
    model, idx = cpu_gpt(torch.float32 if autocast else torch.bfloat16), IDX
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        before = for_decoding(model)
        model.get_parameter(name).data[index] *= -2.0
        after = for_decoding(model)
        assert not torch.equal(logits(after, idx), logits(before, idx))
        assert torch.equal(logits(after, idx), logits(pack(model), idx))
        assert for_decoding(model) is after


def test_weights_made_in_inference_mode_are_packed():
    with torch.inference_mode():
        model, idx = cpu_gpt(torch.bfloat16), IDX
        packed = for_decoding(model)
        assert for_decoding(model) is packed
        torch.testing.assert_close(logits(packed, idx), logits(model, idx), rtol=0.05, atol=0.1)


def test_packed_copy_follows_moves_of_its_model():
    model = cpu_gpt()
    kinds = [{p.dtype for p in for_decoding(model.to(dtype)).parameters()} for dtype in (torch.bfloat16, torch.float32)]
    assert kinds == [{torch.bfloat16}, {torch.float32}]
    with torch.autocast("cpu", torch.bfloat16):
        assert for_decoding(model).lm_head.dtype == torch.bfloat16
    assert for_decoding(model).lm_head.dtype == torch.float32


def test_copies_of_a_model_have_packed_copies_of_their_own():
    model = cpu_gpt(torch.bfloat16)
    packed = for_decoding(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), quantize(model)):
        assert for_decoding(other) is not packed
    assert for_decoding(model) is packed
