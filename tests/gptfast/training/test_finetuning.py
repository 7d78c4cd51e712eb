"""Fine-tuning: pretrained weights, frozen parameters and adapters."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gptfast import GPT, GPTConfig, load_model, lora, tokenizers
from gptfast.checkpoint import run_folder
from gptfast.checkpoint.manager import Checkpoint, CheckpointManager
from gptfast.training import finetuning, trainer
from gptfast.training.config import TrainConfig
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


def load_pretrained(source: Path | str, **wanted) -> GPT:
    return finetuning.load_pretrained(str(source), GPTConfig(**wanted))[0]


def last_checkpoint(run: Path) -> Checkpoint:
    checkpoint, damaged = CheckpointManager(run / "checkpoints", 2).latest()
    assert not damaged
    return checkpoint


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def logits(model: GPT, training: bool = False) -> Tensor:
    idx = torch.arange(16).view(2, 8)
    return model.train(training)(idx, idx)[0]


def changed(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def test_load_pretrained_reads_a_run(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    model, tokenizer = finetuning.load_pretrained("~/run", GPTConfig(block_size=16, n_layer=7, vocab_size=5))
    expected, own = load_model.load_run(base)
    assert model.config == expected.config
    assert tokenizer.to_json() == own.to_json()
    assert changed(model.state_dict(), expected.state_dict()) == set()
    assert all(p.requires_grad for p in model.parameters())


def test_load_pretrained_reads_hugging_faces_layout(hugging_face):
    model, tokenizer = finetuning.load_pretrained(str(hugging_face), GPTConfig(block_size=24))
    expected = GPT.from_pretrained(str(hugging_face))
    assert tokenizer is None
    assert model.config == expected.config
    assert changed(model.state_dict(), expected.state_dict()) == set()


def test_load_pretrained_sets_block_size_dropout_and_padding(base, hugging_face):
    for source in (base, hugging_face):
        model = load_pretrained(source, block_size=8, dropout=0.25, pad_vocab_size_to=64)
        whole = load_pretrained(source, block_size=16)
        assert model.config == dataclasses.replace(whole.config, block_size=8, dropout=0.25, pad_vocab_size_to=64)
        assert model.transformer.wte.weight.shape[0] == -(-whole.config.vocab_size // 64) * 64
        assert model.transformer.wpe.weight.shape == (8, 16)
        assert not model.transformer.wte.weight[model.config.vocab_size :].any()
        torch.testing.assert_close(logits(model), logits(whole))
        assert not torch.equal(logits(model, training=True), logits(model, training=True))
        assert torch.equal(logits(whole, training=True), logits(whole, training=True))


@pytest.mark.parametrize("position", ["sinusoidal", "none"])
def test_load_pretrained_crops_positions_that_are_not_learned(tmp_path, position: str):
    trainer.train(settings(tmp_path, model=GPTConfig(block_size=16, **SIZES, position=position), steps=1))
    model, whole = (load_pretrained(tmp_path / "run", block_size=size) for size in (8, 16))
    assert model.config == dataclasses.replace(whole.config, block_size=8)
    torch.testing.assert_close(logits(model), logits(whole))


def test_select_trainable_adapts_every_linear_layer_by_default():
    model = GPT(GPTConfig(vocab_size=31, **SIZES), "eager")
    finetuning.select_trainable(model, TrainConfig(lora_rank=1))
    assert len(lora.adapters(model)) == 2 * 2 * 4


def test_select_trainable_rejects_adapters_with_fsdp():
    with pytest.raises(ValueError, match="--parallel ddp"):
        finetuning.select_trainable(GPT(GPTConfig(**SIZES), "eager"), TrainConfig(lora_rank=2, parallel="fsdp"))


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
    before = weights(load_pretrained(base, block_size=8))
    assert changed(before, weights(model)) == before.keys()


def test_finetuning_takes_a_tokenizer_for_hugging_faces_layout(hugging_face, tmp_path):
    config, _ = finetune(hugging_face, tmp_path, tokenizer="byte", **LORA)
    model, tokenizer = load_model.load_run(Path(config.out))
    assert tokenizer.to_json() == tokenizers.ByteTokenizer().to_json()
    assert model.config == dataclasses.replace(GPT.from_pretrained(str(hugging_face)).config, block_size=16)


def test_finetuning_rejects_what_does_not_fit_and_leaves_no_folder(base, hugging_face, tmp_path):
    cases = [
        (hugging_face, {"tokenizer": "char"}, "has a vocabulary of 257 tokens, the tokenizer has"),
        (base, {"model": GPTConfig(block_size=17)}, r"has block_size=16, .*17.*--block-size 16$"),
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
