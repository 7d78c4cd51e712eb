import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from gptfast import GPT
from tests.support.oracle import DEVICE

WEIGHT = "transformer.h.0.attn.c_attn.weight"


def edit(folder: Path, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def edit_weights(folder: Path, change) -> None:
    """Apply a function to the dict of tensors in the file."""
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def refused(source: Path | str) -> str:
    """The error, which is one line."""
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as caught:
        GPT.from_pretrained(str(source))
    return str(caught.value)


def assert_same_logits(model: GPT, theirs: transformers.PreTrainedModel) -> None:
    idx = torch.randint(model.config.vocab_size, (3, model.config.block_size)).to(model.lm_head.weight.device)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx, idx)[0], theirs.eval()(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_from_pretrained_gives_the_logits_of_transformers(folder, backend):
    model = GPT.from_pretrained(str(folder), backend=backend).to(DEVICE)
    assert model.config.init_std == 0.3
    assert_same_logits(model, transformers.GPT2LMHeadModel.from_pretrained(folder).to(DEVICE))


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"activation_function": "gelu_pytorch_tanh"},
        {"tie_word_embeddings": False},
        {"n_inner": 128},
        {"n_embd": 64, "n_head": 1, "n_layer": 3},
    ],
    ids=str,
)
def test_from_pretrained_reads_variants(tmp_path, settings):
    torch.manual_seed(1)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**{**sizes, **settings}, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    )
    theirs.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(str(tmp_path)), theirs)


def test_from_pretrained_reads_sharded_weights(folder, tmp_path):
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    files = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(files) > 2
    assert_same_logits(GPT.from_pretrained(str(tmp_path / "sharded")), theirs)

    index = tmp_path / "sharded/model.safetensors.index.json"
    whole = index.read_text()
    places = json.loads(whole)["weight_map"]
    moved = places | {WEIGHT: next(file.name for file in files if file.name != places[WEIGHT])}
    index.write_text(json.dumps({"weight_map": moved}))
    assert f"{moved[WEIGHT]} lacks tensor {WEIGHT}, which model.safetensors.index.json places" in refused(index.parent)
    for content in ({"weight_map": ["a"]}, {}, {"weight_map": {"wte.weight": 3}}):
        index.write_text(json.dumps(content))
        assert refused(index.parent).endswith("is damaged: it has no weight_map from tensors to files")
    index.write_text(json.dumps({"weight_map": {"wte.weight": "../model/model.safetensors"}}))
    assert "'../model/model.safetensors'" in refused(index.parent)
    index.write_text(whole)
    files[1].unlink()
    assert refused(index.parent).endswith(f"has no {files[1].name}, which model.safetensors.index.json names")


def test_from_pretrained_reads_the_bare_transformer_with_mask_buffers(folder):
    """The layout of the original GPT-2 upload: no prefix, and the causal mask as a buffer of every layer."""
    whole = GPT.from_pretrained(str(folder)).state_dict()
    path = folder / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in safetensors.torch.load_file(path).items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    bare["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(bare, path)
    again = GPT.from_pretrained(str(folder)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("kept", [["lm_head.weight"], ["lm_head.weight", "transformer.wte.weight"]], ids=str)
def test_from_pretrained_reads_tied_weights_under_either_name(folder, kept):
    """safetensors keeps the first of two names for one tensor, which is the head's."""

    def rename(tensors):
        embedding = tensors.pop("transformer.wte.weight")
        tensors.update({name: embedding.clone() for name in kept})

    whole = GPT.from_pretrained(str(folder)).state_dict()
    edit_weights(folder, rename)
    model = GPT.from_pretrained(str(folder))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in whole.items())
    assert_same_logits(model, transformers.GPT2LMHeadModel.from_pretrained(folder))


@pytest.mark.parametrize(
    "head", [torch.ones(61, 32), torch.ones(64, 32), torch.zeros(61, 32, dtype=torch.bfloat16)], ids=lambda t: t.shape
)
def test_from_pretrained_rejects_a_head_that_should_be_tied(folder, head):
    """transformers 5 keeps both and older versions drop the head, so the config must decide."""
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    assert "lm_head.weight and transformer.wte.weight are different with tie_word_embeddings=true" in refused(folder)
    if head.shape[0] == 61:
        edit(folder, tie_word_embeddings=False)
        model = GPT.from_pretrained(str(folder))
        assert torch.equal(model.lm_head.weight, head.float())
        assert_same_logits(model, transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_from_pretrained_reads_half_precision_into_float32(folder, dtype):
    whole = GPT.from_pretrained(str(folder)).state_dict()
    edit_weights(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    for name, tensor in GPT.from_pretrained(str(folder)).state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole[name].to(dtype).float()), name


def test_from_pretrained_takes_overrides(folder):
    assert GPT.from_pretrained(str(folder)).config.dropout == 0.0
    model = GPT.from_pretrained(str(folder), {"dropout": 0.1, "pad_vocab_size_to": 64})
    assert (model.config.dropout, model.lm_head.weight.shape) == (0.1, (64, 32))
    assert not model.lm_head.weight[61:].any()
    assert_same_logits(model, transformers.GPT2LMHeadModel.from_pretrained(folder))
    for overrides, message in (
        ({"n_layer": 3}, "override_args has n_layer; accepted: dropout, pad_vocab_size_to"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
    ):
        with pytest.raises(ValueError, match=rf"\A{message}\Z"):
            GPT.from_pretrained(folder, overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "llama"}, "has model_type='llama'; accepted: 'gpt2'"),
        ({"layer_norm_epsilon": 1e-6}, "has layer_norm_epsilon=1e-06; accepted: 1e-05"),
        ({"scale_attn_weights": False}, "has scale_attn_weights=False; accepted: True"),
        (
            {"scale_attn_by_inverse_layer_idx": True},
            "has scale_attn_by_inverse_layer_idx=True; accepted: False",
        ),
        ({"reorder_and_upcast_attn": True}, "has reorder_and_upcast_attn=True; accepted: False"),
        ({"add_cross_attention": True}, "has add_cross_attention=True; accepted: False"),
        ({"is_encoder_decoder": True}, "has is_encoder_decoder=True; accepted: False"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config={'bits': 4}; accepted: None"),
        ({"n_inner": 7}, "has n_inner=7; accepted: None, 128"),
        ({"activation_function": "silu"}, "has activation_function='silu'; accepted: gelu_new"),
        ({"activation_function": []}, "has activation_function=[]; accepted: gelu_new"),
        ({"tie_word_embeddings": "yes"}, "has tie_word_embeddings='yes'; accepted: true, false"),
        ({"n_embd": None}, "is no GPT-2 config: n_embd must be an integer of at least 1, got None"),
        ({"n_head": 5}, "is no GPT-2 config: n_embd must be divisible by n_head"),
        ({"hidden_size": 64}, "tensor transformer.wte.weight is [61, 32], [61, 64] is expected"),
        ({"n_layer": 3}, "does not fit its config.json: it lacks tensor transformer.h.2.ln_1.weight [32]"),
        (
            {"n_layer": 1},
            "does not fit its config.json: tensor transformer.h.1.attn.c_attn.bias is none of the model's",
        ),
        ({"vocab_size": 62}, "tensor transformer.wte.weight is [61, 32], [62, 32] is expected"),
        ({"n_positions": 12}, "tensor transformer.wpe.weight is [24, 32], [12, 32] is expected"),
        ({"tie_word_embeddings": False}, "it lacks tensor lm_head.weight [61, 32]"),
    ],
    ids=str,
)
def test_from_pretrained_rejects_other_configs(folder, settings, message):
    edit(folder, **settings)
    assert message in refused(folder)
    assert refused(folder).startswith(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is damaged: Expecting property name"),
        (b"\xff{}", "config.json is damaged: 'utf-8' codec can't decode"),
        (b"[1]", "config.json is damaged: a JSON object is needed"),
        (b'{"model": {"n_embd": 32}}', "config.json has model_type=None; accepted: 'gpt2'"),
        (b'{"model_type": "gpt2", "n_embd": 32}', "config.json is no GPT-2 config: it has no vocab_size"),
    ],
)
def test_from_pretrained_rejects_damaged_configs(folder, content, message):
    (folder / "config.json").write_bytes(content)
    assert message in refused(folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(1, 32, 96), f"tensor {WEIGHT} is [1, 32, 96], [96, 32] is expected"),
        (torch.zeros(96, 32), f"tensor {WEIGHT} is [32, 96], [96, 32] is expected"),
        (
            torch.zeros(32, 96, dtype=torch.int8),
            f"tensor {WEIGHT} is of dtype int8; accepted: float32, float16, bfloat16",
        ),
        (torch.zeros(32, 96, dtype=torch.float64), "is of dtype float64; accepted: float32, float16, bfloat16"),
    ],
    ids=str,
)
def test_from_pretrained_rejects_misshapen_weights(folder, tensor, message):
    edit_weights(folder, lambda tensors: tensors.update({WEIGHT: tensor}))
    assert message in refused(folder)


def test_from_pretrained_rejects_unknown_tensors(folder):
    edit_weights(folder, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 32)}))
    assert refused(folder).endswith("tensor transformer.score.weight is none of the model's")


@pytest.mark.parametrize("damage", [lambda content: b"\x00" * 30, lambda content: content[:-100]])
def test_from_pretrained_rejects_damaged_weights(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} is damaged: " in refused(folder)


def test_from_pretrained_names_missing_files(folder):
    (folder / "model.safetensors").unlink()
    assert refused(folder).startswith(f"{folder} has no model.safetensors; ")
    for name in ("pytorch_model.bin.index.json", "pytorch_model.bin"):
        (folder / name).write_bytes(b"")
        assert refused(folder).startswith(f"{folder} has no model.safetensors, only the pickle {name}, ")
    (folder / "config.json").unlink()
    assert refused(folder).startswith(f"{folder} has no config.json")


def test_from_pretrained_rejects_unknown_names():
    assert re.match(r"no pretrained model 'gpt5'; accepted: gpt2, gpt2-medium, .*, OWNER/MODEL on", refused("gpt5"))
    assert refused("no/such/folder").startswith("no pretrained model 'no/such/folder'; accepted: ")
