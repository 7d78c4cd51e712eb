"""Fine-tuning: pretrained weights, frozen parameters and adapters."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, load_model, lora, tokenizers
from gptfast.checkpoint import run_folder
from gptfast.checkpoint.manager import Checkpoint, CheckpointManager
from gptfast.tokenizers import CharTokenizer
from gptfast.training import finetuning, trainer
from gptfast.training.config import TrainConfig
from gptfast.training.finetuning import PretrainedInit
from tests.support.tiny_runs import TEXT, tiny_run

OTHER = "to no one that is; a question.\n".replace(";", ",").replace(".", ":") * 40  # of the same characters
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def settings(folder: Path, **changes) -> TrainConfig:
    """A run of 6 steps in float32."""
    folder.mkdir(exist_ok=True)
    (folder / "other.txt").write_text(OTHER)
    rates = {"learning_rate": 1e-2, "min_learning_rate": 1e-2, "warmup_steps": 0}
    length = {"steps": 6, "eval_interval": 6, "checkpoint_interval": 250, "log_interval": 10, "sample_tokens": 0}
    usual = {"model": GPTConfig(block_size=16, **SIZES), "dtype": "float32", **rates, **length}
    return dataclasses.replace(tiny_run(folder), **(usual | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run folder."""
    folder = tmp_path_factory.mktemp("base")
    trainer.train(settings(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> Path:
    """GPT-2 with random weights, as `transformers` saves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hugging face")
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def finetune(base: Path, folder: Path, **changes) -> tuple[TrainConfig, dict]:
    config = settings(folder, init_from=str(base), data=str(folder / "other.txt"), **changes)
    return config, trainer.train(config)


def load_init(source: Path | str, **wanted) -> PretrainedInit:
    return PretrainedInit.load(str(source), GPTConfig(**wanted))


def last_checkpoint(run: Path) -> Checkpoint:
    checkpoint, damaged = CheckpointManager(run / "checkpoints", 2).latest()
    assert not damaged
    return checkpoint


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model: GPT, length: int = 8) -> Tensor:
    idx = torch.arange(2 * length).view(2, length) % 20
    return model.eval()(idx, idx)[0]


def changed(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def test_pretrained_init_loads_a_run(base):
    start = load_init(base, block_size=16, n_layer=7, vocab_size=5)
    expected, tokenizer = load_model.load_run(base)
    assert start.source == str(base)
    assert start.model.config == expected.config
    assert start.tokenizer.to_json() == tokenizer.to_json()
    assert changed(start.model.state_dict(), expected.state_dict()) == set()
    assert all(p.requires_grad for p in start.model.parameters())


def test_pretrained_init_loads_hugging_faces_layout(hugging_face):
    start = load_init(hugging_face, block_size=24)
    expected = GPT.from_pretrained(str(hugging_face))
    assert start.tokenizer is None
    assert start.model.config == expected.config
    assert changed(start.model.state_dict(), expected.state_dict()) == set()


def test_pretrained_init_expands_the_home_folder(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    assert load_init("~/run", block_size=16).model.config.n_layer == 2


def test_pretrained_init_takes_block_size_dropout_and_padding(base, hugging_face):
    for source in (base, hugging_face):
        model = load_init(source, block_size=8, dropout=0.25, pad_vocab_size_to=64).model
        whole = load_init(source, block_size=16).model
        assert model.config == dataclasses.replace(whole.config, block_size=8, dropout=0.25, pad_vocab_size_to=64)
        assert model.transformer.wte.weight.shape[0] == -(-whole.config.vocab_size // 64) * 64
        assert model.transformer.wpe.weight.shape == (8, 16)
        assert not model.transformer.wte.weight[model.config.vocab_size :].any()
        torch.testing.assert_close(logits(model), logits(whole))
        assert not torch.equal(logits_in_training(model), logits_in_training(model))
        assert torch.equal(logits_in_training(whole), logits_in_training(whole))


@torch.no_grad()
def logits_in_training(model: GPT) -> Tensor:
    idx = torch.arange(8)[None]
    return model.train()(idx, idx)[0]


@pytest.mark.parametrize("position", ["sinusoidal", "none"])
def test_pretrained_init_crops_positions_that_are_not_learned(tmp_path, position: str):
    trainer.train(settings(tmp_path, model=GPTConfig(block_size=16, **SIZES, position=position), steps=1))
    model = load_init(tmp_path / "run", block_size=8).model
    whole = load_init(tmp_path / "run", block_size=16).model
    assert model.config == dataclasses.replace(whole.config, block_size=8)
    torch.testing.assert_close(logits(model), logits(whole))


def test_pretrained_init_rejects_a_context_that_is_too_short(base, hugging_face):
    for source, size in ((base, 16), (hugging_face, 24)):
        with pytest.raises(ValueError, match=rf"{source} has block_size={size}, .*25.*--block-size {size}$"):
            load_init(source, block_size=25)


def test_pretrained_init_rejects_bad_sources(base, tmp_path):
    with pytest.raises(ValueError, match=r"'nowhere/at/all'.*gpt2, "):
        load_init("nowhere/at/all")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_init(tmp_path)
    shutil.copytree(base, tmp_path / "run")
    path = tmp_path / "run/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its checksum does not match"):
        load_init(tmp_path / "run", block_size=16)
    path.unlink()
    with pytest.raises(ValueError, match=r"is not a run folder with weights: it has no model\.safetensors"):
        load_init(tmp_path / "run", block_size=16)


def test_pretrained_init_requires_the_tokenizers_vocabulary(base):
    start = load_init(base, block_size=16)
    start.require_vocabulary(start.tokenizer)
    size = start.model.config.vocab_size
    with pytest.raises(ValueError, match=rf"run has a vocabulary of {size} tokens, the tokenizer has 3"):
        start.require_vocabulary(CharTokenizer("abc"))
    padded = load_init(base, block_size=16, pad_vocab_size_to=64)
    padded.require_vocabulary(start.tokenizer)


def select_trainable(**settings) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=31, **SIZES), "eager")
    finetuning.select_trainable(model, TrainConfig(**settings))
    return model


def test_select_trainable_trains_everything_by_default():
    model = select_trainable()
    assert all(p.requires_grad for p in model.parameters())
    assert not lora.is_applied(model)


def test_select_trainable_freezes_by_pattern():
    model = select_trainable(freeze=("transformer.h.0.*", "*.bias"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in weights(model) if n.startswith("transformer.h.0.") or n.endswith(".bias")}


def test_select_trainable_adds_adapters_by_pattern():
    model = select_trainable(lora_rank=3, lora_alpha=6.0, lora_targets=("*.1.attn.*",))
    layers = [f"transformer.h.1.attn.{name}" for name in ("c_attn", "c_proj")]
    assert list(lora.adapters(model)) == [f"{layer}.lora_{matrix}" for layer in layers for matrix in "ab"]
    assert lora.adapters(model)[f"{layers[0]}.lora_a"].shape == (3, 16)
    assert model.get_submodule(layers[0]).parametrizations.weight[0].scale == 2.0
    assert sum(p.requires_grad for p in model.parameters()) == 4
    assert len(lora.adapters(select_trainable(lora_rank=1))) == 2 * 2 * 4  # every linear layer of two blocks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"freeze": ("h.0",)}, r"no parameter matches 'h\.0'"),
        ({"lora_rank": 1, "lora_targets": ("c_attn",)}, "no linear layer matches 'c_attn'"),
        ({"lora_rank": 2, "parallel": "fsdp"}, "--parallel ddp"),
    ],
)
def test_select_trainable_rejects_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        select_trainable(**settings)


STEPS = 12
LORA = {"lora_rank": 2, "lora_alpha": 8.0, "lora_targets": ("*.attn.c_attn", "*.mlp.c_fc")}


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory) -> Path:
    """A run of adapters on another text."""
    config, _ = finetune(base, tmp_path_factory.mktemp("adapted"), **LORA, steps=STEPS, log_interval=1)
    path = Path(config.out)
    losses = [entry["loss"] for entry in run_folder.read_log(path) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    return path


def test_adapters_leave_the_weights_unchanged(base, adapted):
    """Bit for bit, in the checkpoint; all others as well."""
    checkpoint = last_checkpoint(adapted)
    assert checkpoint.step == STEPS
    before = weights(load_model.load_run(base)[0])
    inside = ".parametrizations.weight."
    kept = {n.replace(inside + "original", ".weight"): t for n, t in checkpoint.model.items() if "lora_" not in n}
    assert changed(kept, before) == set()
    trained = {name for name in checkpoint.model if "lora_" in name}
    assert len(trained) == 2 * 2 * 2
    assert all(name.rpartition(".")[0].endswith(inside + "0") for name in trained)
    assert all(checkpoint.model[name].any() for name in trained)
    # nothing else has an optimizer's state
    assert {name.rpartition("/")[0] for name in checkpoint.optimizer} == trained


def test_adapters_file_makes_the_merged_model(base, adapted):
    tensors = safetensors.torch.load_file(adapted / "adapters.safetensors")
    layers = [f"transformer.h.{block}.{layer}" for block in (0, 1) for layer in ("attn.c_attn", "mlp.c_fc")]
    assert sorted(tensors) == [f"{layer}.lora_{matrix}" for layer in layers for matrix in "ab"]
    assert {tensor.shape[0 if name.endswith("a") else 1] for name, tensor in tensors.items()} == {2}
    merged, tokenizer = load_model.load_run(adapted)
    model, own = load_model.load_run(base)
    assert tokenizer.to_json() == own.to_json()
    before = copy.deepcopy(model.state_dict())
    lora.apply(model, LORA["lora_rank"], LORA["lora_alpha"], LORA["lora_targets"])
    lora.load_adapters(model, tensors)
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-5, atol=1e-5)
    lora.merge(model)
    assert changed(model.state_dict(), merged.state_dict()) == set()
    assert changed(before, merged.state_dict()) == {f"{layer}.weight" for layer in layers}


def test_merged_weights_are_an_ordinary_model(base, adapted):
    files = [safetensors.torch.load_file(folder / "model.safetensors") for folder in (base, adapted)]
    assert [(n, t.shape) for n, t in sorted(files[0].items())] == [(n, t.shape) for n, t in sorted(files[1].items())]
    saved = json.loads((adapted / "config.json").read_text())
    assert (saved["lora_rank"], saved["lora_alpha"], saved["init_from"]) == (2, 8.0, str(base))
    assert saved["model"] == json.loads((base / "config.json").read_text())["model"]
    again = load_init(adapted, block_size=16).model
    assert changed(again.state_dict(), load_model.load_run(adapted)[0].state_dict()) == set()
    assert not (base / "adapters.safetensors").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_do_not_change(base, tmp_path, optimizer: str):
    config, _ = finetune(base, tmp_path, freeze=("transformer.h.0.*", "transformer.wpe.*"), optimizer=optimizer)
    before, after = (weights(load_model.load_run(folder)[0]) for folder in (base, Path(config.out)))
    frozen = {name for name in before if name.startswith(("transformer.h.0.", "transformer.wpe."))}
    assert changed(before, after) == before.keys() - frozen
    checkpoint = last_checkpoint(tmp_path / "run")
    assert changed(before, checkpoint.model) == before.keys() - frozen
    assert {name.rpartition("/")[0] for name in checkpoint.optimizer} == before.keys() - frozen
    assert not (tmp_path / "run/adapters.safetensors").exists()


def test_finetuning_trains_everything_by_default(base, tmp_path):
    """With a shorter context, from which the run's own settings come."""
    config, summary = finetune(base, tmp_path, model=GPTConfig(block_size=8, n_layer=9, dropout=0.1))
    model, tokenizer = load_model.load_run(Path(config.out))
    shape = load_model.load_run(base)[0].config
    assert model.config == dataclasses.replace(shape, block_size=8, dropout=0.1)
    assert tokenizer.decode(tokenizer.encode("question").tolist()) == "question"
    assert summary["params"] == model.get_num_params(non_embedding=False)
    before = weights(load_init(base, block_size=8).model)
    assert changed(before, weights(model)) == before.keys()


def test_finetuning_takes_a_tokenizer_for_hugging_faces_layout(hugging_face, tmp_path):
    config, _ = finetune(hugging_face, tmp_path, tokenizer="byte", **LORA)
    model, tokenizer = load_model.load_run(Path(config.out))
    assert tokenizer.to_json() == tokenizers.ByteTokenizer().to_json()
    assert model.config == dataclasses.replace(GPT.from_pretrained(str(hugging_face)).config, block_size=16)


def test_finetuning_rejects_what_does_not_fit_and_leaves_no_folder(base, hugging_face, tmp_path):
    cases = [
        (hugging_face, {"tokenizer": "char"}, "has a vocabulary of 257 tokens, the tokenizer has"),
        (base, {"model": GPTConfig(block_size=17)}, "has block_size=16, less than the 17 asked for"),
        (base, {"freeze": ("*",)}, "leave nothing to train"),
        (base, {"lora_rank": 2, "lora_targets": ("lm_head",)}, "which is the token embedding"),
    ]
    for source, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            finetune(source, tmp_path, **changes)
    config = settings(tmp_path, init_from=str(base))
    (tmp_path / "text.txt").write_text("Ä" + TEXT)
    with pytest.raises(ValueError, match="the tokenizer lacks the characters 'Ä'"):
        trainer.train(config)
    assert not (tmp_path / "run").exists()
