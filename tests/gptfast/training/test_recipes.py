"""Recipes train, at full size where that takes seconds, and generate what they have learned."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import shutil
from pathlib import Path

import pytest
import tiktoken
import torch

from benchmarks.cost_model import operators
from gptfast import GPT, GPTConfig, cli
from gptfast.checkpoint import run_folder
from gptfast.config import PRESETS
from gptfast.data import batches
from gptfast.data.corpus import TEXTS
from gptfast.distributed import World
from gptfast.load_model import load_run
from gptfast.training import dataset, recipes, trainer
from gptfast.training.recipes import RECIPES
from gptfast.training.validation import EvalSet
from tests.support import gpt2_files

CHATBOT, CLINIC, SENTENCES = (TEXTS[name].rstrip() for name in ("chatbot", "clinic", "sentences"))
DETOKENIZED = SENTENCES.replace("\n", " ").replace("-", " - ")  # as the word tokenizer joins words
SHAKESPEARE = Path(__file__).parents[4] / "shared/data/tinyshakespeare.txt"
SIZES = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


DISTINCT = [name for name in RECIPES if not name.startswith("gpt2-") or name == "gpt2-124m"]  # GPT-2s differ in size


def small(model: GPTConfig) -> GPTConfig:
    """A model of the same architecture."""
    return dataclasses.replace(model, block_size=16, n_layer=2, n_head=2, n_embd=32, vocab_size=257)


def assert_fields(config: object, **expected: object) -> None:
    assert {name: getattr(config, name) for name in expected} == expected


def train(out: Path, recipe: str, *options: str) -> Path:
    cli.main(["train", recipe, *options, "--device", "cpu", "--out", str(out)])
    return out


def generate(capsys, folder: Path, prompt: str, tokens: int, *options: str) -> str:
    """The text that `gptfast generate` prints; the prompt is part of it."""
    capsys.readouterr()
    length = ["--max-new-tokens", str(tokens)]
    cli.main(["generate", str(folder), "--device", "cpu", "--prompt", prompt, *length, *options])
    return capsys.readouterr().out.rstrip("\n")


def losses(folder: Path) -> list[float]:
    return [entry["loss"] for entry in run_folder.read_log(folder) if "loss" in entry]


def assert_memorised(folder: Path) -> dict:
    """Return the last evaluation."""
    evaluations = [entry for entry in run_folder.read_log(folder) if "val_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [50, 100]
    assert evaluations[-1]["val_loss"] < 0.05
    return evaluations[-1]


@pytest.mark.parametrize("name", DISTINCT)
def test_recipe_learns_at_a_reduced_size(name: str, tmp_path, capsys):
    """A narrow model on a small text, with the recipe's optimizer, schedule, clipping and dropout."""
    recipe = RECIPES[name]
    config = dataclasses.replace(
        recipe, model=small(recipe.model), device="cpu", out=str(tmp_path / "run"), tokenizer="byte", data="chatbot",
        held_out=0.0, batch_size=16, accumulation=2, learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=0,
        steps=80, eval_interval=80, checkpoint_interval=0, sample_tokens=3,
    )  # fmt: skip
    summary = trainer.train(config)
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(257), abs=0.3)  # uniform predictions
    assert summary["val_loss"] < 2.5  # frequencies of bytes alone reach 3.0
    assert summary["params"] == operators.parameters(config.model)
    text = generate(capsys, tmp_path / "run", "Hello", 30, "--temperature", "0")  # past the window of 16
    assert text.startswith("Hello")
    assert len(text) > 16


@torch.no_grad()
@pytest.mark.parametrize("name", DISTINCT)
def test_recipe_is_causal(name: str):
    """Changing a token changes no logits before it, and all from there on."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(small(RECIPES[name].model), init_std=0.2), "eager").eval()
    idx = torch.randint(257, (3, 16))
    before = model(idx, idx)[0]
    for place in (1, 7, 15):
        other = idx.clone()
        other[:, place] = (other[:, place] + 1) % 257
        after = model(other, other)[0]
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-5, atol=1e-6)
        assert (after[:, place:] - before[:, place:]).abs().amax(-1).min() > 1e-3


@pytest.fixture(scope="module")
def word_gpt(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("word") / "run", "word-gpt")


def test_train_prints_a_command_that_samples(tmp_path, capsys):
    """With the prompt of the run's samples: a word tokenizer has no line break to start with."""
    train(tmp_path / "run", "word-gpt", "--steps", "1")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command == ["gptfast", "generate", str(tmp_path / "run"), "--prompt", "The quick brown"]
    cli.main([*command[1:], "--device", "cpu", "--max-new-tokens", "2"])
    assert capsys.readouterr().out.startswith("The quick brown")


def test_word_gpt_generates_without_a_prompt(word_gpt, capsys):
    capsys.readouterr()
    for options in ([], ["--num-beams", "2"]):
        cli.main(["generate", str(word_gpt), "--device", "cpu", "--max-new-tokens", "3", *options])
        words, known = (text.replace(".", " .").split() for text in (capsys.readouterr().out, DETOKENIZED))
        assert len(words) <= 3
        assert set(words) <= set(known)


def test_word_gpt_memorises_its_sentences(word_gpt, capsys):
    assert assert_memorised(word_gpt)["sample"].startswith("The quick brown fox jumps over the lazy dog. This")
    sentence = "the quick brown fox jumps over the lazy dog."
    assert generate(capsys, word_gpt, "the quick brown", 7, "--temperature", "0") == sentence
    for options in (["--temperature", "0"], ["--num-beams", "3"]):
        text = generate(capsys, word_gpt, "the quick brown", 30, *options)
        assert text == sentence + DETOKENIZED[len(sentence) :]


def test_word_gpt_draws_every_window():
    split = dataset.load(RECIPES["word-gpt"]).train
    assert len(split.tokens) == 33
    assert len({tuple(row) for step in range(100) for row in split.random_batch(23, 1337, step)[0].tolist()}) == 23


@pytest.fixture(scope="module")
def simple_gpt(tmp_path_factory) -> Path:
    """On bytes: GPT-2's tokens need a download."""
    out = tmp_path_factory.mktemp("simple") / "run"
    return train(out, "simple-gpt", "--tokenizer", "byte", "--block-size", "145")


def test_simple_gpt_memorises_its_text(simple_gpt, capsys):
    assert_memorised(simple_gpt)
    length = len(CHATBOT) - len("Hello,")
    assert generate(capsys, simple_gpt, "Hello,", length, "--temperature", "0") == CHATBOT
    for options in (["--top-k", "5"], ["--top-p", "0.9"]):
        assert generate(capsys, simple_gpt, "Hello,", length, *options).startswith("Hello, how are you today?")


def test_simple_gpt_reads_gpt2s_vocabulary_from_a_folder(tmp_path, monkeypatch, capsys):
    """Without a network, and with other merges than GPT-2's."""
    (vocabulary := tmp_path / "vocabulary").mkdir()
    gpt2_files.write(vocabulary)
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail(f"{url} was asked for"))
    options = ["--vocabulary", str(vocabulary), "--steps", "10"]
    with pytest.raises(SystemExit):
        train(tmp_path / "none", "simple-gpt", *options)
    assert "vocab.bpe that tiktoken knows" in capsys.readouterr().err
    with gpt2_files.accepted():
        out = train(tmp_path / "run", "simple-gpt", *options)
    assert "13,266,432 parameters, 2 layers of width 128, context 32; " in capsys.readouterr().out
    assert losses(out)[0] == pytest.approx(10.825, abs=0.2)
    assert losses(out)[-1] < losses(out)[0] - 1.0
    shutil.rmtree(vocabulary)  # the run has a copy
    assert generate(capsys, out, "Hello,", 5).startswith("Hello,")
    model, tokenizer = load_run(out)
    assert tokenizer.end_of_text == 50256
    assert_fields(model.config, vocab_size=50257, n_embd=128, n_layer=2, n_head=4, position="learned")
    assert_fields(model.config, activation="relu", norm_position="post", dropout=0.0)


def test_simple_gpt_is_finetuned_on_another_text(simple_gpt, tmp_path, capsys):
    options = ["--data", "clinic", "--init-from", str(simple_gpt), "--block-size", "145", "--sample-prompt", "The"]
    out = train(tmp_path / "run", "simple-gpt", *options)
    before, after = load_run(simple_gpt), load_run(out)
    assert after[1].to_json() == before[1].to_json()
    split = batches.split_tokens(after[1].encode(TEXTS["clinic"]), 145, held_out=0.0)[0]
    first, last = (EvalSet(split, 1, 1).mean_loss(model, torch.float32, World()) for model, _ in (before, after))
    assert first > 3.0
    assert last < 0.05
    text = generate(capsys, out, "The patient", len(CLINIC) - len("The patient"), "--temperature", "0")
    assert text == CLINIC


@pytest.mark.parametrize("name", ["simple-gpt", "word-gpt"])
def test_adam_is_adamw_without_decay(name: str):
    assert_fields(RECIPES[name], optimizer="adamw", weight_decay=0.0, beta1=0.9, beta2=0.999)
    assert_fields(RECIPES[name], learning_rate=1e-3, schedule="constant", warmup_steps=0, grad_clip=0.0)


@pytest.mark.parametrize(
    ("device", "shape", "length"),
    [
        ("cuda", {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "dropout": 0.2}, (5000, 64)),
        ("cpu", {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "dropout": 0.0}, (2000, 12)),
    ],
)
def test_shakespeare_char_is_nanogpts(device: str, shape: dict, length: tuple[int, int]):
    recipe = recipes.recipe("shakespeare-char", torch.device(device))
    usual = {"norm_position": "pre", "position": "learned", "bias": False, "tie_weights": True}
    assert_fields(recipe.model, **shape, activation="gelu", **usual)
    assert (recipe.steps, recipe.batch_size) == length
    assert_fields(recipe, data="shakespeare", tokenizer="char", held_out=0.1, weight_decay=0.1, grad_clip=1.0)
    assert_fields(recipe, learning_rate=1e-3, min_learning_rate=1e-4, warmup_steps=100, beta1=0.9, beta2=0.99)


@pytest.mark.slow
@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="needs Tiny Shakespeare beside the checkout")
def test_shakespeare_char_cpu_reaches_nanogpts_loss(tmp_path):
    """nanoGPT's README gives 1.88 for these settings."""
    out = train(tmp_path / "run", "shakespeare-char", "--data", str(SHAKESPEARE))
    assert json.loads((out / "summary.json").read_text())["val_loss"] <= 1.90


@pytest.mark.parametrize("name", SIZES)
def test_gpt2_recipe_has_gpt2s_size(name: str):
    recipe = RECIPES[name]
    assert recipe.model == dataclasses.replace(PRESETS[name], pad_vocab_size_to=128)
    with torch.device("meta"):
        model = GPT(recipe.model, "eager")
    assert model.get_num_params(non_embedding=False) == operators.parameters(recipe.model) == SIZES[name]


@pytest.mark.parametrize(
    ("name", "learning_rate", "micro_batch"),  # Brown et al. 2020, table 2.1
    [("gpt2-124m", 6e-4, 12), ("gpt2", 6e-4, 12), ("gpt2-medium", 3e-4, 6), ("gpt2-large", 2.5e-4, 4),
     ("gpt2-xl", 2e-4, 3)],
)  # fmt: skip
def test_pretraining_is_nanogpts(name: str, learning_rate: float, micro_batch: int):
    recipe = RECIPES[name]
    assert_fields(recipe, learning_rate=learning_rate, steps=600_000, warmup_steps=2000, schedule="cosine")
    assert_fields(recipe, optimizer="adamw", weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0)
    assert_fields(recipe, tokenizer="gpt2", held_out=0.1, accumulation=recipe.batch_size // micro_batch)
    assert recipe.min_learning_rate == pytest.approx(learning_rate / 10)
    assert recipe.batch_size * recipe.model.block_size == 491_520


def test_gpt2_124m_is_the_books():
    """163 million parameters, because the head is not tied to the embedding."""
    with torch.device("meta"):
        untied, tied = (
            GPT(GPTConfig.from_dict(recipes.GPT_CONFIG_124M, tie_weights=tie), "eager") for tie in (False, True)
        )
    model = RECIPES["gpt2-124m"].model
    assert model == dataclasses.replace(untied.config, pad_vocab_size_to=128)
    assert untied.get_num_params(non_embedding=False) == operators.parameters(model) == 163_009_536
    assert tied.get_num_params(non_embedding=False) == 124_412_160
    assert SIZES["gpt2"] - 124_412_160 == 12 * 3 * 768  # the biases of queries, keys and values
    assert tied.transformer.h[0].attn.c_attn.bias is None
    assert tied.config.dropout == 0.1
