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

from gptfast import GPT, hardware, load_model, optim, tokenizers
from gptfast.commands.train import describe
from gptfast.data import batches
from gptfast.training import recipes, setup, trainer
from gptfast.training.config import TrainConfig
from gptfast.training.train_step import StepResult, TrainStep
from gptfast.training.validation import EvalSet
from tests.support.tiny_runs import TEXT, before_step, raising, tiny_run


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    """A run of 20 steps that takes a fraction of a second."""
    return tiny_run(tmp_path)


def log(path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def test_a_run_folder(config, tmp_path):
    summary = trainer.train(config)
    path = tmp_path / "run"
    assert sorted(file.name for file in path.iterdir() if file.name != ".lock") == [
        "checkpoints",
        "config.json",
        "log.jsonl",
        "loss.png",
        "model.safetensors",
        "summary.json",
        "tokenizer.json",
    ]
    assert json.loads((path / "summary.json").read_text()) | {"run": str(path)} == summary
    assert summary["steps"] == 20
    assert summary["params"] == load_model.load_run(path)[0].get_num_params(non_embedding=False)
    assert summary["device"] == "cpu"
    assert summary["backend"] == {"layer_norm": "cpu", "ffn": "cpu", "attention": "cpu", "loss": "eager"}
    assert summary["interrupted"] is False
    assert summary["processes"] == 1
    assert summary["validation_text"] == "held out"
    assert 0 <= summary["data_seconds"] < summary["seconds"]
    assert 0 < summary["checkpoint_seconds"] < summary["seconds"]
    assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / math.log(2))  # a character is a byte
    assert 0 < summary["mfu"] < 1.5
    assert summary["tokens_per_second"] > 0
    assert summary["val_loss"] < math.log(len(set(TEXT))), "nothing was learned"
    losses, evaluations = [e for e in log(path) if "loss" in e], [e for e in log(path) if "val_loss" in e]
    assert [entry["step"] for entry in losses] == [1, 5, 8, 10, 15, 16, 20]
    assert [entry["step"] for entry in evaluations] == [8, 16, 20]
    assert summary["val_loss"] == min(entry["val_loss"] for entry in evaluations)
    assert losses[0].keys() == {
        "step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "memory_bytes", "data_seconds"
    }  # fmt: skip
    assert evaluations[0].keys() == {
        "step", "val_loss", "train_loss", "val_perplexity", "val_bits_per_byte", "sample"
    }  # fmt: skip
    assert {len(entry["sample"]) for entry in evaluations} == {5}
    assert sorted(file.name for file in (path / "checkpoints").iterdir()) == ["step-00000016", "step-00000020"]


def test_nothing_held_out(config, tmp_path, capsys):
    """Validation is on the training text, and is said to be."""
    summary = trainer.train(dataclasses.replace(config, held_out=0.0))
    assert "; 1,720 training tokens, on which validation is too, vocabulary 17; " in capsys.readouterr().out
    assert summary["validation_text"] == json.loads((tmp_path / "run/summary.json").read_text())["validation_text"]
    assert summary["validation_text"] == "training"
    model, tokenizer = load_model.load_run(tmp_path / "run")
    whole = batches.split_tokens(tokenizer.encode(TEXT), 16, held_out=0.0)[0]
    idx, targets = (torch.cat(parts) for parts in zip(*whole.eval_batches(2, 4), strict=True))
    with torch.no_grad():
        expected = model(idx, targets)[1].item()
    assert summary["val_loss"] == summary["train_loss"] == pytest.approx(expected, rel=0.02)  # bfloat16 has 8 bits
    said = describe(summary)
    assert said.startswith(f"loss {summary['val_loss']:.4f} (")
    assert " bits per byte) on the training text, nothing being held out, after 20 steps in " in said
    again = trainer.train(dataclasses.replace(config, held_out=0.0, resume=True, steps=24))
    assert (again["steps"], again["validation_text"]) == (24, "training")
    assert describe(trainer.train(dataclasses.replace(config, out=str(tmp_path / "usual")))).startswith("valida")


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    first = trainer.train(config)
    again = trainer.train(dataclasses.replace(config, out=str(tmp_path / "again")))
    other = trainer.train(dataclasses.replace(config, out=str(tmp_path / "other"), seed=2))
    assert (again["val_loss"], again["train_loss"]) == (first["val_loss"], first["train_loss"])
    assert other["val_loss"] != first["val_loss"]


def test_the_saved_weights_are_those_of_the_best_evaluation(config, tmp_path, monkeypatch):
    losses = iter([3.0, 3.1, 1.0, 1.1, 2.0, 2.1])  # validation, train at steps 8, 16 and 20
    monkeypatch.setattr(EvalSet, "mean_loss", lambda *arguments: next(losses))
    summary = trainer.train(config)
    assert (summary["val_loss"], summary["train_loss"]) == (1.0, 1.1)
    best, last = (
        safetensors.torch.load_file(tmp_path / "run" / path / "model.safetensors")
        for path in ("", "checkpoints/step-00000016")
    )
    assert best.keys() == last.keys()
    assert all(torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_finishes_its_step_and_goes_on(config, tmp_path, monkeypatch, asked):
    whole = trainer.train(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        before_step(patched, 10, lambda: signal.raise_signal(asked))
        summary = trainer.train(config)
    assert (summary["interrupted"], summary["steps"]) == (True, 11)
    assert not (tmp_path / "run/summary.json").exists()
    assert (tmp_path / "run/checkpoints/step-00000011").is_dir()
    again = trainer.train(dataclasses.replace(config, resume=True))
    assert (again["interrupted"], again["steps"], again["val_loss"]) == (False, 20, whole["val_loss"])


def test_a_second_interrupt_does_not_wait(config, tmp_path, monkeypatch):
    before_step(monkeypatch, 6, lambda: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config)
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_that_fails_later_keeps_what_it_has(config, tmp_path, monkeypatch):
    before_step(monkeypatch, 1, raising(MemoryError()))
    with pytest.raises(MemoryError):
        trainer.train(config)
    assert [entry["step"] for entry in log(tmp_path / "run")] == [1]


def outcomes(monkeypatch, values: dict[int, tuple[float, float, float]]) -> None:
    """Give steps these losses, norms and scales."""
    ordinary = (1.0, 1.0, 1.0)
    results = lambda run, step, idx, targets: StepResult(torch.tensor(values.get(step, ordinary)))  # noqa: E731
    monkeypatch.setattr(trainer, "take_step", results)


@pytest.mark.parametrize(
    ("values", "message"), [((math.nan, 1.0, 1.0), "loss is nan"), ((1.0, math.inf, 1.0), "gradient's norm is inf")]
)
def test_a_step_that_is_no_number_ends_the_run_and_its_batch_is_kept(config, tmp_path, monkeypatch, values, message):
    """The step that it began with, though the log is written at the tenth."""
    outcomes(monkeypatch, {6: values, 7: (math.nan, math.nan, 1.0)})
    with pytest.raises(RuntimeError, match=rf"the {message} at step 7; lower --learning-rate .*failed-batch.safetens"):
        trainer.train(config)
    failed = json.loads((tmp_path / "run/failed-step.json").read_text())
    assert failed == {"step": 7, "seed": 1337, "loss": str(values[0]), "grad_norm": str(values[1])}
    batch = safetensors.torch.load_file(tmp_path / "run/failed-batch.safetensors")
    text = corpus_ids(TEXT)
    idx, targets = batches.split_tokens(text, 16, 0.1)[0].random_batch(4, 1337, 6)
    assert torch.equal(batch["idx"], idx)
    assert torch.equal(batch["targets"], targets)


def corpus_ids(text: str) -> np.ndarray:
    return tokenizers.for_documents("char", [text]).encode(text)


@pytest.mark.parametrize(("scale", "ends"), [(1.0, False), (2.0**-7, True)])
def test_float16_may_overflow_while_its_scale_finds_its_level(config, monkeypatch, scale, ends):
    outcomes(monkeypatch, {6: (1.0, math.inf, scale), 9: (1.0, math.inf, scale)})
    config = dataclasses.replace(config, dtype="float16")
    if ends:
        with pytest.raises(RuntimeError, match="the gradient's norm is inf at step 7"):
            trainer.train(config)
    else:
        trainer.train(config)
        (entry,) = [e for e in log(Path(config.out)) if e["step"] == 10]
        assert (entry["grad_norm"], entry["loss_scale"]) == (None, 1.0)


def test_without_a_peak_there_is_no_mfu(config, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "peak_flops", lambda device, dtype: None)
    monkeypatch.setattr(hardware, "describe", lambda device: f"unknown GPU {device}")
    assert trainer.train(config)["mfu"] is None
    assert ", so no MFU: unknown GPU cpu\n" in capsys.readouterr().out


def test_a_bad_peak_is_found_before_the_folder_is_made(config, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTFAST_PEAK_FLOPS", "fast")
    with pytest.raises(ValueError, match="GPTFAST_PEAK_FLOPS is 'fast'"):
        trainer.train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("losses", "message"), [((math.inf, 1.0), "validation loss is inf"), ((1.0, math.nan), "train loss is nan")]
)
def test_an_evaluation_that_is_no_number_ends_the_run(config, tmp_path, monkeypatch, losses, message):
    """The step's own loss may still be a number: it is of another batch."""
    values = iter((2.0, 2.0, *losses))
    monkeypatch.setattr(EvalSet, "mean_loss", lambda *arguments: next(values))
    with pytest.raises(RuntimeError, match=f"the {message} after step 16; lower --learning-rate"):
        trainer.train(config)
    assert [entry["step"] for entry in log(tmp_path / "run") if "val_loss" in entry] == [8]
    assert not (tmp_path / "run/summary.json").exists()


def test_the_settings_reach_the_step(config, monkeypatch):
    made = []

    def recorded(model, optimizer, *settings):
        made.append((model.transformer.checkpointing, model.transformer.residual_dtype, *settings))
        return TrainStep(model, optimizer, *settings)

    monkeypatch.setattr(setup, "TrainStep", recorded)
    settings = {
        "dtype": "float16",
        "grad_clip": 0.5,
        "accumulation": 2,
        "checkpoint_activations": True,
        "residual_dtype": "bfloat16",
    }
    trainer.train(dataclasses.replace(config, steps=1, **settings))
    assert made == [(True, torch.bfloat16, 2, 0.5, torch.float16, False)]


def test_parts_of_a_batch_train_like_the_whole(config):
    whole = trainer.train(config)
    parts = trainer.train(dataclasses.replace(config, accumulation=4, out=config.out + "2"))
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)


def test_every_step_uses_its_batch_and_learning_rate(config, monkeypatch):
    drawn, rates = [], []
    draw, step = batches.Split.random_batch, torch.optim.AdamW.step

    def recorded_step(self):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self)

    monkeypatch.setattr(batches.Split, "random_batch", lambda self, *args: drawn.append(args) or draw(self, *args))
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    config = dataclasses.replace(config, seed=5, schedule="wsd", decay_share=0.5)
    trainer.train(config)
    assert drawn == [(4, 5, number, 0, 1) for number in range(20)]
    expected = [optim.learning_rate("wsd", number, 20, 1e-3, 1e-4, 5, 0.5) for number in range(20)]
    assert rates == [[rate] * 2 for rate in expected]
    assert [entry["learning_rate"] for entry in log(Path(config.out)) if "loss" in entry][-1] == expected[-1]


def test_dropout_is_on_in_training_and_off_in_evaluation(config, monkeypatch):
    modes = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT,
        "forward",
        lambda self, *args, **options: (
            modes.append((torch.is_grad_enabled(), self.training)) or forward(self, *args, **options)
        ),
    )
    trainer.train(dataclasses.replace(config, steps=4, eval_interval=1))
    assert set(modes) == {(True, True), (False, False)}


def test_speed_counts_neither_evaluations_nor_the_first_step(config, monkeypatch):
    def slow_first_step(run, step, idx, targets):
        time.sleep(0.5 if step == 0 else 0.01)
        return StepResult(torch.ones(2))

    monkeypatch.setattr(trainer, "take_step", slow_first_step)
    monkeypatch.setattr(EvalSet, "mean_loss", lambda *arguments: time.sleep(0.3) or 1.0)
    summary = trainer.train(config)
    tokens_per_step = 4 * 16
    assert tokens_per_step / 0.02 < summary["tokens_per_second"] <= tokens_per_step / 0.01
    assert summary["seconds"] > 0.5 + 19 * 0.01 + 6 * 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0 and finite, got nan"),
        ({"grad_clip": float("inf")}, "grad_clip must be at least 0 and finite, got inf"),
        ({"residual_dtype": "int8"}, "residual_dtype must be one of auto, float32, bfloat16, got 'int8'"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, got 'sgd'"),
        ({"parallel": "pipeline"}, "parallel must be one of ddp, fsdp, got 'pipeline'"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1, got 0"),
        ({"checkpoint_interval": -1}, "checkpoint_interval must be at least 0, got -1"),
        ({"resume": True}, "resume .*--out"),
        ({"freeze": ["*"], "lora_rank": 2}, "freeze .*lora_rank"),
        ({"schedule": "linear"}, "schedule must be one of cosine, constant, wsd, got 'linear'"),
        ({"decay_share": 1.5}, r"decay_share must be in \[0, 1\], got 1.5"),
        ({"accumulation": 3}, "batch_size must be a multiple of accumulation=3, got 64"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*64\), got -1"),
        ({"beta2": 1.0}, r"beta2 must be in \[0, 1\), got 1.0"),
        ({"held_out": 1.0}, r"held_out must be in \[0, 1\), got 1.0"),
        ({"held_out": -0.1}, r"held_out must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_recipes():
    assert recipes.recipe("shakespeare-char", torch.device("cpu")) is recipes.RECIPES["shakespeare-char-cpu"]
    assert recipes.recipe("shakespeare-char", torch.device("cuda")) is recipes.RECIPES["shakespeare-char-gpu"]
    with pytest.raises(ValueError, match="unknown preset 'gpt5'; accepted: shakespeare-char, shakespeare-char-gpu"):
        recipes.recipe("gpt5", torch.device("cpu"))


def test_default_folders_are_numbered(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = dataclasses.replace(config, out=None, steps=1)
    assert trainer.train(short, "name")["run"] == "runs/name"
    assert trainer.train(short, "name")["run"] == "runs/name-2"


def test_tokens_that_the_tokenizer_does_not_have(config, tmp_path):
    """NanoGPT's files do not tell their tokenizer."""
    (tmp_path / "ids").mkdir()
    for split in ("train", "val"):
        np.full(200, 300, dtype="<u2").tofile(tmp_path / f"ids/{split}.bin")
    with pytest.raises(ValueError, match=r"ids has token id 300.*'byte'.*257"):
        trainer.train(dataclasses.replace(config, data=str(tmp_path / "ids"), tokenizer="byte"))
