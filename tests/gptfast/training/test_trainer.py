import dataclasses
import json
import math
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from gptfast import GPT, hardware, optim, tokenizers
from gptfast.checkpoint.run_folder import read_log
from gptfast.commands.train import describe
from gptfast.data import batches
from gptfast.load_model import load_run
from gptfast.training import setup, trainer
from gptfast.training.config import TrainConfig
from gptfast.training.train_step import StepResult, TrainStep
from gptfast.training.validation import EvalSet
from tests.support.tiny_runs import TEXT, before_step, tiny_run


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return tiny_run(tmp_path)


def patch_steps(monkeypatch, result) -> None:
    """Replace training steps by `result(step)`."""
    monkeypatch.setattr(trainer, "take_step", lambda run, step, idx, targets: result(step))


def patch_mean_losses(monkeypatch, *losses: float) -> None:
    """Replace the losses of evaluations, validation before training."""
    values = iter(losses)
    monkeypatch.setattr(EvalSet, "mean_loss", lambda *arguments: next(values))


def test_trainer_writes_a_run_folder(config, tmp_path):
    summary = trainer.train(config)
    path = tmp_path / "run"
    assert sorted(file.name for file in path.iterdir() if file.name != ".lock") == [
        "checkpoints", "config.json", "log.jsonl", "loss.png", "model.safetensors", "summary.json", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((path / "summary.json").read_text()) | {"run": str(path)} == summary
    expected = {
        "steps": 20,
        "params": load_run(path)[0].get_num_params(non_embedding=False),
        "device": "cpu",
        "backend": dict.fromkeys(("layer_norm", "ffn", "attention"), "cpu") | {"loss": "eager"},
        "interrupted": False,
        "processes": 1,
        "validation_text": "held out",
        "val_perplexity": pytest.approx(math.exp(summary["val_loss"])),
        "val_bits_per_byte": pytest.approx(summary["val_loss"] / math.log(2)),  # a character is a byte
    }
    assert {name: summary[name] for name in expected} == expected
    assert 0 <= summary["data_seconds"] < summary["seconds"]
    assert 0 < summary["checkpoint_seconds"] < summary["seconds"]
    assert 0 < summary["mfu"] < 1.5
    assert summary["tokens_per_second"] > 0
    assert summary["val_loss"] < math.log(len(set(TEXT))), "nothing was learned"
    steps, evaluations = ([e for e in read_log(path) if name in e] for name in ("loss", "val_loss"))
    assert [entry["step"] for entry in steps] == [1, 5, 8, 10, 15, 16, 20]
    assert [entry["step"] for entry in evaluations] == [8, 16, 20]
    assert summary["val_loss"] == min(entry["val_loss"] for entry in evaluations)
    assert steps[0].keys() == {
        "step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "memory_bytes", "data_seconds"
    }  # fmt: skip
    assert evaluations[0].keys() == {
        "step", "val_loss", "train_loss", "val_perplexity", "val_bits_per_byte", "sample"
    }  # fmt: skip
    assert {len(entry["sample"]) for entry in evaluations} == {5}
    assert sorted(file.name for file in (path / "checkpoints").iterdir()) == ["step-00000016", "step-00000020"]
    assert describe(summary).startswith(f"validation loss {summary['val_loss']:.4f} (")


def test_trainer_validates_on_the_training_text_if_nothing_is_held_out(config, tmp_path, capsys):
    config = dataclasses.replace(config, held_out=0.0)
    summary = trainer.train(config)
    assert "; 1,720 training tokens, on which validation is too, vocabulary 17; " in capsys.readouterr().out
    assert summary["validation_text"] == "training"
    model, tokenizer = load_run(tmp_path / "run")
    whole = batches.split_tokens(tokenizer.encode(TEXT), 16, held_out=0.0)[0]
    idx, targets = (torch.cat(parts) for parts in zip(*whole.eval_batches(2, 4), strict=True))
    with torch.no_grad():
        expected = model(idx, targets)[1].item()
    assert summary["val_loss"] == summary["train_loss"] == pytest.approx(expected, rel=0.02)  # bfloat16 has 8 bits
    text = describe(summary)
    assert text.startswith(f"loss {summary['val_loss']:.4f} (")
    assert " on the training text, nothing being held out, after 20 steps in " in text
    again = trainer.train(dataclasses.replace(config, resume=True, steps=24))
    assert (again["steps"], again["validation_text"]) == (24, "training")


def test_trainer_repeats_a_run_with_the_same_seed(config, tmp_path):
    first, again, other = (
        trainer.train(dataclasses.replace(config, out=str(tmp_path / name), seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert (again["val_loss"], again["train_loss"]) == (first["val_loss"], first["train_loss"])
    assert other["val_loss"] != first["val_loss"]


def test_trainer_saves_the_weights_of_the_best_evaluation(config, tmp_path, monkeypatch):
    patch_mean_losses(monkeypatch, 3.0, 3.1, 1.0, 1.1, 2.0, 2.1)  # at steps 8, 16 and 20
    summary = trainer.train(config)
    assert (summary["val_loss"], summary["train_loss"]) == (1.0, 1.1)
    best, expected = (
        safetensors.torch.load_file(tmp_path / "run" / path / "model.safetensors")
        for path in ("", "checkpoints/step-00000016")
    )
    assert best.keys() == expected.keys()
    assert all(torch.equal(best[name], expected[name]) for name in best)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trainer_finishes_the_step_and_saves_when_interrupted(config, tmp_path, monkeypatch, number):
    whole = trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        before_step(patched, 10, lambda: signal.raise_signal(number))
        summary = trainer.train(config)
    assert (summary["interrupted"], summary["steps"]) == (True, 11)
    assert not (tmp_path / "run/summary.json").exists()
    assert (tmp_path / "run/checkpoints/step-00000011").is_dir()
    again = trainer.train(dataclasses.replace(config, resume=True))
    assert (again["interrupted"], again["steps"], again["val_loss"]) == (False, 20, whole["val_loss"])


@pytest.mark.parametrize(
    ("values", "message"), [((math.nan, 1.0, 1.0), "loss is nan"), ((1.0, math.inf, 1.0), "gradient's norm is inf")]
)
def test_trainer_ends_at_a_step_that_is_not_finite_and_saves_its_batch(config, tmp_path, monkeypatch, values, message):
    """The first such step, though the host waits for it at the tenth."""
    results = {6: values, 7: (math.nan, math.nan, 1.0)}
    patch_steps(monkeypatch, lambda step: StepResult(torch.tensor(results.get(step, (1.0, 1.0, 1.0)))))
    with pytest.raises(RuntimeError, match=rf"{message} at step 7.*--learning-rate.*failed-batch\.safetensors"):
        trainer.train(config)
    failed = json.loads((tmp_path / "run/failed-step.json").read_text())
    assert failed == {"step": 7, "seed": 1337, "loss": str(values[0]), "grad_norm": str(values[1])}
    batch = safetensors.torch.load_file(tmp_path / "run/failed-batch.safetensors")
    ids = tokenizers.for_documents("char", [TEXT]).encode(TEXT)
    idx, targets = batches.split_tokens(ids, 16, 0.1)[0].random_batch(4, 1337, 6)
    assert torch.equal(batch["idx"], idx)
    assert torch.equal(batch["targets"], targets)


@pytest.mark.parametrize(("scale", "ends"), [(1.0, False), (2.0**-7, True)])
def test_trainer_lets_float16_overflow_until_its_scale_is_tiny(config, monkeypatch, scale, ends):
    overflow, finite = (1.0, math.inf, scale), (1.0, 1.0, 1.0)
    patch_steps(monkeypatch, lambda step: StepResult(torch.tensor(overflow if step in (6, 9) else finite)))
    config = dataclasses.replace(config, dtype="float16")
    if ends:
        with pytest.raises(RuntimeError, match="norm is inf at step 7"):
            trainer.train(config)
    else:
        trainer.train(config)
        (entry,) = [e for e in read_log(Path(config.out)) if e["step"] == 10]
        assert (entry["grad_norm"], entry["loss_scale"]) == (None, 1.0)


@pytest.mark.parametrize(
    ("losses", "message"), [((math.inf, 1.0), "validation loss is inf"), ((1.0, math.nan), "train loss is nan")]
)
def test_trainer_ends_at_an_evaluation_that_is_not_finite(config, tmp_path, monkeypatch, losses, message):
    """The loss of the step itself may be finite: it is of another batch."""
    patch_mean_losses(monkeypatch, 2.0, 2.0, *losses)
    with pytest.raises(RuntimeError, match=f"{message} after step 16.*--learning-rate"):
        trainer.train(config)
    assert [entry["step"] for entry in read_log(tmp_path / "run") if "val_loss" in entry] == [8]
    assert not (tmp_path / "run/summary.json").exists()


def test_trainer_reports_no_mfu_without_a_peak(config, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: None)
    monkeypatch.setattr(hardware, "describe", lambda device: f"unknown GPU {device}")
    assert trainer.train(config)["mfu"] is None
    assert ", so no MFU: unknown GPU cpu\n" in capsys.readouterr().out


def test_trainer_rejects_a_bad_peak_before_it_makes_the_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTFAST_PEAK_FLOPS", "fast")
    with pytest.raises(ValueError, match=r"GPTFAST_PEAK_FLOPS.*'fast'"):
        trainer.train(config)
    assert not (tmp_path / "run").exists()


def test_trainer_passes_settings_to_the_step(config, monkeypatch):
    made = []

    def recorded(model, optimizer, *settings):
        made.append((model.transformer.checkpointing, model.transformer.residual_dtype, *settings))
        return TrainStep(model, optimizer, *settings)

    monkeypatch.setattr(setup, "TrainStep", recorded)
    memory = {"checkpoint_activations": True, "residual_dtype": "bfloat16", "accumulation": 2}
    trainer.train(dataclasses.replace(config, steps=1, dtype="float16", grad_clip=0.5, **memory))
    assert made == [(True, torch.bfloat16, 2, 0.5, torch.float16, False)]


def test_trainer_uses_every_batch_and_learning_rate_once(config, monkeypatch):
    drawn, rates = [], []
    draw, step = batches.Split.random_batch, torch.optim.AdamW.step

    def recorded_step(self):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self)

    monkeypatch.setattr(batches.Split, "random_batch", lambda self, *args: drawn.append(args) or draw(self, *args))
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    trainer.train(dataclasses.replace(config, seed=5, schedule="wsd", decay_share=0.5))
    assert drawn == [(4, 5, number, 0, 1) for number in range(20)]
    expected = [optim.learning_rate("wsd", number, 20, 1e-3, 1e-4, 5, 0.5) for number in range(20)]
    assert rates == [[rate] * 2 for rate in expected]
    assert [entry["learning_rate"] for entry in read_log(Path(config.out)) if "loss" in entry][-1] == expected[-1]


def test_trainer_drops_out_in_training_only(config, monkeypatch):
    modes = set()
    forward = GPT.forward

    def recorded(self, *arguments, **options):
        modes.add((torch.is_grad_enabled(), self.training))
        return forward(self, *arguments, **options)

    monkeypatch.setattr(GPT, "forward", recorded)
    trainer.train(dataclasses.replace(config, steps=4, eval_interval=1))
    assert modes == {(True, True), (False, False)}


def test_throughput_leaves_out_evaluations_and_the_first_step(config, monkeypatch):
    patch_steps(monkeypatch, lambda step: time.sleep(0.01 if step else 0.5) or StepResult(torch.ones(2)))
    monkeypatch.setattr(EvalSet, "mean_loss", lambda *arguments: time.sleep(0.3) or 1.0)
    summary = trainer.train(config)
    tokens_per_step = 4 * 16
    assert tokens_per_step / 0.02 < summary["tokens_per_second"] <= tokens_per_step / 0.01
    assert summary["seconds"] > 0.5 + 19 * 0.01 + 6 * 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps .*got 0"),
        ({"learning_rate": float("nan")}, "learning_rate .*got nan"),
        ({"residual_dtype": "int8"}, "residual_dtype .*auto, float32, bfloat16, got 'int8'"),
        ({"optimizer": "sgd"}, "optimizer .*adamw, muon, got 'sgd'"),
        ({"parallel": "pipeline"}, "parallel .*ddp, fsdp, got 'pipeline'"),
        ({"schedule": "linear"}, "schedule .*cosine, constant, wsd, got 'linear'"),
        ({"checkpoint_interval": -1}, "checkpoint_interval .*got -1"),
        ({"decay_share": 1.5}, r"decay_share .*\[0, 1\], got 1.5"),
        ({"accumulation": 3}, "batch_size .*accumulation=3, got 64"),
        ({"batch_size": 2**31}, "batch_size .*got 2147483648"),
        ({"seed": -1}, r"seed .*\[0, 2\*\*64\), got -1"),
        ({"beta2": 1.0}, r"beta2 .*\[0, 1\), got 1.0"),
        ({"held_out": -0.1}, r"held_out .*\[0, 1\), got -0.1"),
        ({"resume": True}, "resume .*--out"),
        ({"freeze": ["*"], "lora_rank": 2}, "freeze .*lora_rank"),
    ],
)
def test_train_config_rejects_bad_values(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_trainer_numbers_default_folders(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(config, out=None, steps=1)
    assert trainer.train(short, "name")["run"] == "runs/name"
    assert trainer.train(short, "name")["run"] == "runs/name-2"


def test_trainer_rejects_token_ids_beyond_the_tokenizer(config, tmp_path):
    """Folders in nanoGPT's format do not name their tokenizer."""
    (tmp_path / "ids").mkdir()
    for split in ("train", "val"):
        np.full(200, 300, dtype="<u2").tofile(tmp_path / f"ids/{split}.bin")
    with pytest.raises(ValueError, match=r"ids has token id 300.*'byte'.*257.*--tokenizer"):
        trainer.train(dataclasses.replace(config, data=str(tmp_path / "ids"), tokenizer="byte"))
