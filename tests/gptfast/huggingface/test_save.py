import dataclasses
import json
import re
from pathlib import Path

import pytest
import safetensors
import torch
import transformers

from gptfast import GPT, GPTConfig, lora
from tests.support.files import no_space

SIZES = {"block_size": 24, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 32, "init_std": 0.3}


def build(**settings) -> GPT:
    """A model whose parameters are all random, biases and norms too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SIZES | settings), backend="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.3)
    return model


def assert_same(model: GPT, folder: Path) -> None:
    """Check that transformers loads all weights, and computes the same logits and greedy text."""
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    theirs.eval()
    idx = torch.randint(model.config.vocab_size, (3, model.config.block_size))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], atol=1e-4, rtol=0)
    prompts = idx[:, :4]
    text = theirs.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    assert torch.equal(text, model.generate(prompts, 20, temperature=0))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"activation": "gelu"},
        {"activation": "relu"},
        {"tie_weights": False},
        {"pad_vocab_size_to": 64},
        {"pad_vocab_size_to": 64, "tie_weights": False},
        {"n_head": 1, "n_layer": 3, "dropout": 0.2},
        {"vocab_size": 50257, "n_layer": 1},
    ],
    ids=str,
)
def test_save_pretrained_is_loaded_by_transformers(tmp_path, settings):
    model = build(**settings)
    model.save_pretrained(tmp_path / "out")
    assert_same(model, tmp_path / "out")
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert {saved.embd_pdrop, saved.attn_pdrop, saved.resid_pdrop} == {model.config.dropout}
    overrides = {"dropout": model.config.dropout, "pad_vocab_size_to": model.config.pad_vocab_size_to}
    again = GPT.from_pretrained(str(tmp_path / "out"), overrides)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_save_pretrained_writes_the_files_of_transformers(tmp_path, folder):
    """Names, tensors and their shapes, and the settings, are as `transformers` saves the same model."""
    GPT.from_pretrained(str(folder)).save_pretrained(tmp_path / "out")
    theirs, ours = (safetensors.safe_open(path / "model.safetensors", "pt") for path in (folder, tmp_path / "out"))
    assert ours.metadata()["format"] == "pt"
    assert set(ours.keys()) == set(theirs.keys())
    for name in ours.keys():  # noqa: SIM118, it is no mapping
        assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name
    written, expected = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", folder))
    named = {"bos_token_id", "eos_token_id", "embd_pdrop", "attn_pdrop", "resid_pdrop"}  # transformers' own defaults
    assert {name: value for name, value in written.items() if name in expected and name not in named} == {
        name: value for name, value in expected.items() if name in written and name not in named
    }
    assert written["n_positions"] == 24


@pytest.mark.parametrize("settings", [{"bias": False}, {"qkv_bias": False}, {"bias": False, "qkv_bias": True}], ids=str)
def test_save_pretrained_writes_missing_biases_as_zeros(tmp_path, settings):
    model = build(**settings)
    model.save_pretrained(tmp_path / "out")
    assert_same(model, tmp_path / "out")
    again = GPT.from_pretrained(tmp_path / "out")
    assert again.config == dataclasses.replace(model.config, dropout=0.0)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"bias": False}, "attn.c_attn"),
        ({"bias": False}, "attn.c_proj"),
        ({"bias": False, "qkv_bias": True}, "ln_2"),
        ({"qkv_bias": False}, "attn.c_attn"),
    ],
    ids=str,
)
def test_from_pretrained_keeps_biases_that_transformers_trained(tmp_path, settings, name):
    build(**settings).save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.get_parameter(f"transformer.h.1.{name}.bias").data[3] = 0.5
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT.from_pretrained(tmp_path / "theirs")
    assert (model.config.bias, model.config.has_qkv_bias) == (True, True)
    assert_same(model, tmp_path / "theirs")


@pytest.mark.parametrize(
    ("name", "value"), [("norm_position", "post"), ("position", "sinusoidal"), ("position", "none")]
)
def test_save_pretrained_rejects_other_architectures(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"\A{name}='{value}' [^\n]*; accepted: [^\n]*\Z"):
        build(**{name: value}).save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_pretrained_rejects_other_weights(tmp_path):
    model = build()
    model.transformer.h[1].mlp.c_fc = torch.nn.Identity()
    message = "the model cannot be saved in Hugging Face's layout: it lacks tensor transformer.h.1.mlp.c_fc.weight"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=r"weight is of dtype float64; accepted: float32, float16, bfloat16"):
        build().double().save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_pretrained_keeps_half_precision(tmp_path):
    model = build().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.transformer.wte.weight, model.transformer.wte.weight)


def test_save_pretrained_merges_adapters(tmp_path):
    model = build(tie_weights=False)
    lora.apply(model, 2, 4.0, ["*.attn.*", "*.mlp.*", "lm_head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "out")
    assert_same(model, tmp_path / "out")
    assert lora.is_applied(model)


def test_save_pretrained_writes_gpt2s_end_of_text(tmp_path):
    for vocab_size, end in ((50257, 50256), (50304, None)):
        build(vocab_size=vocab_size, n_layer=1, n_embd=4, n_head=1).save_pretrained(tmp_path / str(vocab_size))
        saved = json.loads((tmp_path / str(vocab_size) / "config.json").read_text())
        assert (saved["bos_token_id"], saved["eos_token_id"]) == (end, end)


def test_save_pretrained_rejects_a_folder_that_is_not_empty(tmp_path):
    model = build()
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    before = sorted(tmp_path.rglob("*"))
    for taken in (tmp_path / "empty", tmp_path / "empty/config.json"):
        with pytest.raises(ValueError, match=rf"{re.escape(str(taken))} is not empty; give a new folder"):
            model.save_pretrained(taken)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "os.rename"])
def test_save_pretrained_leaves_nothing_on_a_full_disk(tmp_path, monkeypatch, call):
    monkeypatch.setattr(call, no_space)
    with pytest.raises(OSError, match="No space left on device"):
        build().save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
