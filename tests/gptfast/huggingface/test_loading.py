import json

import pytest
import safetensors.torch
import torch

from gptfast import GPT, pretrained

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture
def folder(tmp_path):
    """GPT-2 with random weights, as `transformers` saves it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SIZES, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    return tmp_path


def edit(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_logits_are_those_of_transformers(folder, backend):
    model = GPT.from_pretrained(str(folder), backend=backend)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    idx = torch.randint(61, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


def test_files_of_the_bare_transformer_with_mask_buffers(folder):
    """The layout of the original GPT-2 upload: no prefix, and the causal mask as a buffer of every layer."""
    whole = GPT.from_pretrained(str(folder))
    path = folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in safetensors.torch.load_file(path).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    safetensors.torch.save_file(bare, path)
    again = GPT.from_pretrained(str(folder))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_dropout_can_be_overridden_alone(folder):
    assert GPT.from_pretrained(str(folder)).config.dropout == 0.0
    assert GPT.from_pretrained(str(folder), {"dropout": 0.1}).config.dropout == 0.1
    with pytest.raises(ValueError, match="override_args accepts dropout and pad_vocab_size_to, got n_layer"):
        GPT.from_pretrained(str(folder), {"n_layer": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon=1e-06, only 1e-05 is supported"),
        ({"scale_attn_weights": False}, "has scale_attn_weights=False, only True is supported"),
        ({"n_inner": 7}, r"has n_inner=7, only 4 \* n_embd is supported"),
        ({"activation_function": "silu"}, "has activation 'silu'; accepted: gelu_new"),
        ({"n_layer": 3}, r"does not fit its config.json: tensor transformer.h.2"),
        ({"vocab_size": 62}, "does not fit its config.json: tensor transformer.wte.weight"),
    ],
)
def test_what_does_not_fit(folder, settings, message):
    edit(folder, **settings)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is damaged: Expecting property name"),
        (b"\xff{}", "config.json is damaged: 'utf-8' codec can't decode"),
        (b"[1]", "config.json is damaged: a JSON object is needed"),
        (b'{"n_embd": 32}', "config.json is no GPT-2 config: it has no n_positions"),
        (b"{}", "config.json is no GPT-2 config: it has no n_embd"),
        (b'{"n_embd": 32, "activation_function": []}', "config.json is no GPT-2 config: unhashable type: 'list'"),
    ],
)
def test_a_config_that_is_none(folder, content, message):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(str(folder))


def test_weights_that_are_none(folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["transformer.h.0.attn.c_attn.weight"] = torch.zeros(1, 32, 96)
    safetensors.torch.save_file(weights, path)
    with pytest.raises(ValueError, match=r"does not fit its config.json: tensor transformer.h.0.attn.c_attn.weight"):
        GPT.from_pretrained(str(folder))
    path.write_bytes(b"\x00" * 30)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged: "):
        GPT.from_pretrained(str(folder))


def test_missing_files(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        GPT.from_pretrained(str(folder))
    with pytest.raises(ValueError, match="no pretrained model 'gpt5'; accepted: gpt2, gpt2-medium"):
        GPT.from_pretrained("gpt5")


def test_the_hub_is_asked_for_the_right_files(folder, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(name) or str(folder))
    assert GPT.from_pretrained("gpt2").config.n_embd == 32
    assert asked == ["openai-community/gpt2"]


def test_a_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(name, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(
        ValueError, match=r"openai-community/gpt2-xl could not be downloaded .*give a local folder"
    ) as e:
        GPT.from_pretrained("gpt2-xl")
    assert "\n" not in str(e.value)
    assert pretrained.HUB_NAMES.keys() == {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"}
