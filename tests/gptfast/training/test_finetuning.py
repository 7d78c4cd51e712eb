"""Beginning with trained weights, and training a part of them, to a run folder that is like any other."""

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
from gptfast.checkpoint.manager import CheckpointManager
from gptfast.tokenizers import CharTokenizer
from gptfast.training import finetuning, trainer
from gptfast.training.config import TrainConfig
from gptfast.training.finetuning import PretrainedInit

TEXT = "To be, or not to be, that is the question:\n" * 40
OTHER = "to no one that is; a question.\n".replace(";", ",").replace(".", ":") * 40  # of the same characters
CPU = torch.device("cpu")
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}


def settings(folder: Path, **changes) -> TrainConfig:
    """A run of 6 steps that takes a fraction of a second."""
    folder.mkdir(exist_ok=True)
    for name, text in (("text", TEXT), ("other", OTHER)):
        (folder / f"{name}.txt").write_text(text)
    usual = TrainConfig(
        model=GPTConfig(block_size=16, **SIZES),
        data=str(folder / "text.txt"),
        out=str(folder / "run"),
        device="cpu",
        dtype="float32",
        steps=6,
        batch_size=4,
        learning_rate=1e-2,
        min_learning_rate=1e-2,
        warmup_steps=0,
        eval_interval=6,
        eval_batches=2,
        sample_tokens=0,
    )
    return dataclasses.replace(usual, **changes)


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


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model: GPT, length: int = 8) -> Tensor:
    idx = torch.arange(2 * length).view(2, length) % 20
    return model.eval()(idx, idx)[0]


def changed(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def test_the_model_of_a_run(base):
    start = PretrainedInit.load(str(base), GPTConfig(block_size=16, n_layer=7, vocab_size=5))
    expected, tokenizer = load_model.load_run(base)
    assert start.source == str(base)
    assert start.model.config == expected.config
    assert start.tokenizer.to_json() == tokenizer.to_json()
    assert changed(start.model.state_dict(), expected.state_dict()) == set()
    assert all(p.requires_grad for p in start.model.parameters())


def test_the_model_of_a_folder_in_hugging_faces_layout(hugging_face):
    start = PretrainedInit.load(str(hugging_face), GPTConfig(block_size=24))
    expected = GPT.from_pretrained(str(hugging_face))
    assert start.tokenizer is None
    assert start.model.config == expected.config
    assert changed(start.model.state_dict(), expected.state_dict()) == set()


def test_the_home_folder_may_be_a_tilde(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    assert PretrainedInit.load("~/run", GPTConfig(block_size=16)).model.config.n_layer == 2


def test_block_size_dropout_and_padding_are_those_wanted(base, hugging_face):
    for source in (base, hugging_face):
        wanted = GPTConfig(block_size=8, dropout=0.25, pad_vocab_size_to=64)
        model = PretrainedInit.load(str(source), wanted).model
        whole = PretrainedInit.load(str(source), GPTConfig(block_size=16)).model
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
def test_positions_that_are_not_learned_are_cropped_too(tmp_path, position: str):
    trainer.train(settings(tmp_path, model=GPTConfig(block_size=16, **SIZES, position=position), steps=1))
    model = PretrainedInit.load(str(tmp_path / "run"), GPTConfig(block_size=8)).model
    whole = PretrainedInit.load(str(tmp_path / "run"), GPTConfig(block_size=16)).model
    assert model.config == dataclasses.replace(whole.config, block_size=8)
    torch.testing.assert_close(logits(model), logits(whole))


def test_a_context_that_is_too_short(base, hugging_face):
    for source, size in ((base, 16), (hugging_face, 24)):
        with pytest.raises(
            ValueError, match=rf"{source} has block_size={size}, less than the 25 asked for; give --block-size {size}$"
        ):
            PretrainedInit.load(str(source), GPTConfig(block_size=25))


def test_sources_that_are_none(base, tmp_path):
    with pytest.raises(ValueError, match=r"no pretrained model 'nowhere/at/all'; accepted: gpt2, .*or a local folder"):
        PretrainedInit.load("nowhere/at/all", GPTConfig())
    with pytest.raises(ValueError, match=r"has no config\.json"):
        PretrainedInit.load(str(tmp_path), GPTConfig())
    shutil.copytree(base, tmp_path / "run")
    path = tmp_path / "run/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its checksum does not match"):
        PretrainedInit.load(str(tmp_path / "run"), GPTConfig(block_size=16))
    path.unlink()
    with pytest.raises(ValueError, match=r"is not a run folder with weights: it has no model\.safetensors"):
        PretrainedInit.load(str(tmp_path / "run"), GPTConfig(block_size=16))


def test_the_vocabulary_has_to_be_the_tokenizers(base):
    start = PretrainedInit.load(str(base), GPTConfig(block_size=16))
    start.require_vocabulary(start.tokenizer)
    size = start.model.config.vocab_size
    with pytest.raises(ValueError, match=rf"run has a vocabulary of {size} tokens, the tokenizer has 3"):
        start.require_vocabulary(CharTokenizer("abc"))
    padded = PretrainedInit.load(str(base), GPTConfig(block_size=16, pad_vocab_size_to=64))
    padded.require_vocabulary(start.tokenizer)


def build() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=16, vocab_size=31, **SIZES), "eager")


def test_nothing_asked_for_restricts_nothing():
    model = build()
    finetuning.select_trainable(model, TrainConfig())
    assert all(p.requires_grad for p in model.parameters())
    assert not lora.is_applied(model)


def test_frozen_by_pattern():
    model = build()
    finetuning.select_trainable(model, TrainConfig(freeze=("transformer.h.0.*", "*.bias")))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in weights(model) if n.startswith("transformer.h.0.") or n.endswith(".bias")}
    with pytest.raises(ValueError, match=r"no parameter matches 'h\.0'"):
        finetuning.select_trainable(build(), TrainConfig(freeze=("h.0",)))


def test_adapters_by_rank_size_and_pattern():
    model = build()
    finetuning.select_trainable(model, TrainConfig(lora_rank=3, lora_alpha=6.0, lora_targets=("*.1.attn.*",)))
    layers = [f"transformer.h.1.attn.{name}" for name in ("c_attn", "c_proj")]
    assert list(lora.adapters(model)) == [f"{layer}.lora_{matrix}" for layer in layers for matrix in "ab"]
    assert lora.adapters(model)[f"{layers[0]}.lora_a"].shape == (3, 16)
    assert model.get_submodule(layers[0]).parametrizations.weight[0].scale == 2.0
    assert sum(p.requires_grad for p in model.parameters()) == 4
    every = build()
    finetuning.select_trainable(every, TrainConfig(lora_rank=1))
    assert len(lora.adapters(every)) == 2 * 2 * 4  # every linear layer of two blocks
    with pytest.raises(ValueError, match="no linear layer matches 'c_attn'"):
        finetuning.select_trainable(build(), TrainConfig(lora_rank=1, lora_targets=("c_attn",)))


def test_adapters_are_not_for_parameters_in_parts():
    with pytest.raises(ValueError, match="adapters work with --parallel ddp, not with fsdp"):
        finetuning.select_trainable(build(), TrainConfig(lora_rank=2, parallel="fsdp"))


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


def test_weights_beside_adapters_stay(base, adapted):
    """Bit for bit, in the checkpoint; all others as well."""
    checkpoint, wrong = CheckpointManager(adapted / "checkpoints", 2).latest()
    assert (checkpoint.step, wrong) == (STEPS, [])
    before = weights(load_model.load_run(base)[0])
    inside = ".parametrizations.weight."
    kept = {
        name.replace(inside + "original", ".weight"): t for name, t in checkpoint.model.items() if "lora_" not in name
    }
    assert changed(kept, before) == set()
    trained = {name for name in checkpoint.model if "lora_" in name}
    assert len(trained) == 2 * 2 * 2
    assert all(name.rpartition(".")[0].endswith(inside + "0") for name in trained)
    assert all(checkpoint.model[name].any() for name in trained)
    # nothing else has an optimizer's state
    assert {name.rpartition("/")[0] for name in checkpoint.optimizer} == trained


def test_adapters_alone_make_the_merged_model(base, adapted):
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


def test_the_merged_weights_are_a_file_like_any_other(base, adapted):
    shapes = [
        {name: tensor.shape for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items()}
        for folder in (base, adapted)
    ]
    assert shapes[0] == shapes[1]
    saved = json.loads((adapted / "config.json").read_text())
    assert (saved["lora_rank"], saved["lora_alpha"], saved["init_from"]) == (2, 8.0, str(base))
    assert saved["model"] == json.loads((base / "config.json").read_text())["model"]
    again = PretrainedInit.load(str(adapted), GPTConfig(block_size=16)).model
    assert changed(again.state_dict(), load_model.load_run(adapted)[0].state_dict()) == set()
    assert not (base / "adapters.safetensors").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_of_adapters_goes_on(base, tmp_path, optimizer: str):
    """As if it had not ended, bit for bit."""
    changes = {**LORA, "optimizer": optimizer, "schedule": "constant", "eval_interval": 100}
    finetune(base, tmp_path / "whole", **changes)
    finetune(base, tmp_path / "parts", steps=3, **changes)
    finetune(base, tmp_path / "parts", resume=True, **changes)
    for name in ("model", "optimizer"):
        whole, parts = (
            getattr(CheckpointManager(tmp_path / folder / "run/checkpoints", 2).latest()[0], name)
            for folder in ("whole", "parts")
        )
        assert changed(whole, parts) == set()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_parameters_stay_and_all_others_change(base, tmp_path, optimizer: str):
    config, _ = finetune(base, tmp_path, freeze=("transformer.h.0.*", "transformer.wpe.*"), optimizer=optimizer)
    before, after = (weights(load_model.load_run(folder)[0]) for folder in (base, Path(config.out)))
    frozen = {name for name in before if name.startswith(("transformer.h.0.", "transformer.wpe."))}
    assert changed(before, after) == before.keys() - frozen
    checkpoint = CheckpointManager(tmp_path / "run/checkpoints", 2).latest()[0]
    assert changed(before, checkpoint.model) == before.keys() - frozen
    assert {name.rpartition("/")[0] for name in checkpoint.optimizer} == before.keys() - frozen
    assert not (tmp_path / "run/adapters.safetensors").exists()


def test_all_is_trained_where_nothing_restricts_it(base, tmp_path):
    """With a shorter context, from which the run's own settings come."""
    config, summary = finetune(base, tmp_path, model=GPTConfig(block_size=8, n_layer=9, dropout=0.1))
    model, tokenizer = load_model.load_run(Path(config.out))
    shape = load_model.load_run(base)[0].config
    assert model.config == dataclasses.replace(shape, block_size=8, dropout=0.1)
    assert tokenizer.decode(tokenizer.encode("question").tolist()) == "question"
    assert summary["params"] == model.get_num_params(non_embedding=False)
    before = weights(PretrainedInit.load(str(base), GPTConfig(block_size=8)).model)
    assert changed(before, weights(model)) == before.keys()


def test_from_hugging_face_with_a_tokenizer_that_fits(hugging_face, tmp_path):
    config, _ = finetune(hugging_face, tmp_path, tokenizer="byte", **LORA)
    model, tokenizer = load_model.load_run(Path(config.out))
    assert tokenizer.to_json() == tokenizers.ByteTokenizer().to_json()
    assert model.config == dataclasses.replace(GPT.from_pretrained(str(hugging_face)).config, block_size=16)


def test_what_does_not_fit_leaves_no_folder(base, hugging_face, tmp_path):
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
