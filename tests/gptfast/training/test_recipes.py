"""The named runs: each trains, at its full size where that takes seconds, and writes what it has learned."""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
from pathlib import Path

import pytest
import tiktoken
import torch
from torch import Tensor

from benchmarks.cost_model import operators
from gptfast import GPT, GPTConfig, Sampling, cli, generate_text, load_model
from gptfast.checkpoint import run_folder
from gptfast.config import PRESETS
from gptfast.data import batches
from gptfast.data.corpus import TEXTS
from gptfast.distributed import World
from gptfast.generation import text as texts
from gptfast.generation.beam_search import BeamSearch
from gptfast.tokenizers import TiktokenTokenizer
from gptfast.tokenizers.byte import END_OF_TEXT
from gptfast.training import dataset, recipes, trainer
from gptfast.training.recipes import RECIPES
from gptfast.training.validation import EvalSet
from tests.support import gpt2_files

CPU = torch.device("cpu")
CHATBOT, CLINIC, SENTENCES = (TEXTS[name].rstrip() for name in ("chatbot", "clinic", "sentences"))
SPOKEN = SENTENCES.replace("\n", " ").replace("-", " - ")  # as words are put together


def with_end_at_50256() -> tiktoken.Encoding:
    """Bytes, tokens that no text has, and the end of text where GPT-2 has it: nothing has to be downloaded."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {f"<{rank}>".encode(): rank for rank in range(256, 50256)}
    return tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50256})


def small(model: GPTConfig) -> GPTConfig:
    """A model of the same kind."""
    return dataclasses.replace(model, block_size=16, n_layer=2, n_head=2, n_embd=32, vocab_size=257)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_and_writes_at_a_reduced_size(name: str, tmp_path, capsys):
    """A narrow model of its kind on a small text, by its own optimizer, schedule, clipping and dropout."""
    recipe = RECIPES[name]
    batch = {"tokenizer": "byte", "data": "chatbot", "held_out": 0.0, "batch_size": 16, "accumulation": 2}
    rates = {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 0, "steps": 80}
    seen = {"eval_interval": 80, "checkpoint_interval": 0, "sample_tokens": 3, "out": str(tmp_path / "run")}
    config = dataclasses.replace(recipe, model=small(recipe.model), device="cpu", **batch, **rates, **seen)
    summary = trainer.train(config)
    losses = [entry["loss"] for entry in run_folder.read_log(tmp_path / "run") if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(257), abs=0.3)  # that of a guess
    assert summary["val_loss"] < 2.5  # frequencies of bytes alone have 3.0
    assert summary["params"] == operators.parameters(config.model)
    # past the window of 16
    written = generated(capsys, tmp_path / "run", "--prompt", "Hello", "--temperature", "0", "--max-new-tokens", "30")
    assert written.startswith("Hello")
    assert len(written) > 16


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_sees_the_future(name: str):
    """Another token changes no logits before its place, and those from there on."""
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(small(RECIPES[name].model), init_std=0.2), "eager").eval()
    idx = torch.randint(257, (3, 16))
    before = logits(model, idx)
    for place in (1, 7, 15):
        other = idx.clone()
        other[:, place] = (other[:, place] + 1) % 257
        after = logits(model, other)
        torch.testing.assert_close(after[:, :place], before[:, :place], rtol=1e-5, atol=1e-6)
        assert (after[:, place:] - before[:, place:]).abs().amax(-1).min() > 1e-3


def logits(model: GPT, idx: Tensor) -> Tensor:
    return model(idx, idx)[0]


def generated(capsys, folder: Path, *options: str) -> str:
    capsys.readouterr()
    cli.main(["generate", str(folder), "--device", "cpu", *options])
    return capsys.readouterr().out.rstrip("\n")


@pytest.fixture(scope="module")
def word_gpt(tmp_path_factory) -> Path:
    """The run of one command."""
    out = tmp_path_factory.mktemp("word") / "run"
    cli.main(["train", "word-gpt", "--device", "cpu", "--out", str(out)])
    return out


def test_the_command_that_a_run_ends_with_samples_it(tmp_path, capsys):
    """With the prompt of its samples: what a text may begin with, words and their like cannot be told otherwise."""
    cli.main(["train", "word-gpt", "--device", "cpu", "--out", str(tmp_path / "run"), "--steps", "1"])
    said = capsys.readouterr().out.splitlines()[-1]
    assert shlex.split(said) == ["gptfast", "generate", str(tmp_path / "run"), "--prompt", "The quick brown"]
    cli.main([*shlex.split(said)[1:], "--device", "cpu", "--max-new-tokens", "2"])
    assert capsys.readouterr().out.startswith("The quick brown")


def test_word_gpt_without_a_prompt(word_gpt, capsys):
    """The prompt that is there if none is given, a line's end, is no word."""
    capsys.readouterr()
    for options in ([], ["--num-beams", "2"]):
        cli.main(["generate", str(word_gpt), "--device", "cpu", "--max-new-tokens", "3", *options])
        written = marks_apart(capsys.readouterr().out)
        assert len(written) <= 3
        assert set(written) <= set(marks_apart(SPOKEN))


def marks_apart(text: str) -> list[str]:
    return text.replace(".", " .").split()


def test_word_gpt_knows_its_sentences_by_heart(word_gpt, capsys):
    """Greedily and by beams; its causal mask keeps it from going in circles."""
    evaluations = [entry for entry in run_folder.read_log(word_gpt) if "val_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [50, 100]
    assert evaluations[-1]["val_loss"] < 0.05
    assert evaluations[-1]["sample"].startswith("The quick brown fox jumps over the lazy dog. This")
    sentence = "the quick brown fox jumps over the lazy dog."
    asked = ("--prompt", "the quick brown", "--temperature", "0", "--max-new-tokens")
    assert generated(capsys, word_gpt, *asked, "7") == sentence
    assert generated(capsys, word_gpt, *asked, "30") == sentence + SPOKEN[len(sentence) :]
    searched = generated(capsys, word_gpt, "--prompt", "the quick brown", "--num-beams", "3", "--max-new-tokens", "30")
    assert searched == sentence + SPOKEN[len(sentence) :]


def test_word_gpt_is_the_architecture_that_it_says():
    model = RECIPES["word-gpt"].model
    assert (model.n_embd, model.n_layer, model.n_head, model.block_size, model.dropout) == (128, 2, 8, 10, 0.1)
    assert (model.activation, model.norm_position, model.position) == ("relu", "post", "sinusoidal")
    split = dataset.load(RECIPES["word-gpt"]).train
    assert len(split.tokens) == 33
    starts = {tuple(row) for step in range(100) for row in split.random_batch(23, 1337, step)[0].tolist()}
    assert len(starts) == 23  # every place where a window can begin


@pytest.fixture(scope="module")
def simple_gpt(tmp_path_factory) -> Path:
    """The run of one command, where GPT-2's tokens cannot be had."""
    out = tmp_path_factory.mktemp("simple") / "run"
    cli.main(
        ["train", "simple-gpt", "--tokenizer", "byte", "--block-size", "145", "--device", "cpu", "--out", str(out)]
    )
    return out


def test_simple_gpt_knows_its_text_by_heart(simple_gpt, capsys):
    """Greedily, and among the likeliest tokens."""
    evaluations = [entry for entry in run_folder.read_log(simple_gpt) if "val_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [50, 100]
    assert evaluations[-1]["val_loss"] < 0.05
    asked = ("--prompt", "Hello,", "--max-new-tokens", str(len(CHATBOT) - len("Hello,")))
    assert generated(capsys, simple_gpt, *asked, "--temperature", "0") == CHATBOT
    for sampled in (["--top-k", "5"], ["--top-p", "0.9"]):
        assert generated(capsys, simple_gpt, *asked, *sampled).startswith("Hello, how are you today?")


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    """A folder with files in the format of GPT-2's."""
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    gpt2_files.write(folder)
    return folder


def test_simple_gpt_of_gpt2s_tokens(tmp_path, vocabulary, monkeypatch, capsys):
    """The preset as it is, without a network, but for the merges of the vocabulary and the number of steps."""
    monkeypatch.setattr(tiktoken.load, "read_file", lambda url: pytest.fail(f"{url} was asked for"))
    train = ["train", "simple-gpt", "--vocabulary", str(vocabulary), "--device", "cpu", "--steps", "10"]
    with pytest.raises(SystemExit):
        cli.main([*train, "--out", str(tmp_path / "none")])
    assert "vocab.bpe that tiktoken knows: its checksum does not match\n" in capsys.readouterr().err
    with gpt2_files.accepted():
        cli.main([*train, "--out", str(tmp_path / "run")])
    assert "13,266,432 parameters, 2 layers of width 128, context 32; " in capsys.readouterr().out
    losses = [entry["loss"] for entry in run_folder.read_log(tmp_path / "run") if "loss" in entry]
    assert losses[0] == pytest.approx(10.825, abs=0.2)
    assert losses[-1] < losses[0] - 1.0
    shutil.rmtree(vocabulary)  # the run has its own
    assert generated(capsys, tmp_path / "run", "--prompt", "Hello,", "--max-new-tokens", "5").startswith("Hello,")
    model, tokenizer = load_model.load_run(tmp_path / "run")
    assert (model.config.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    shape = model.config
    assert (shape.n_embd, shape.n_layer, shape.n_head, shape.position) == (128, 2, 4, "learned")
    assert (shape.activation, shape.norm_position, shape.dropout) == ("relu", "post", 0.0)


def test_fine_tuning_on_another_domain(simple_gpt, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--data", "clinic", "--init-from", str(simple_gpt), "--block-size", "145", "--sample-prompt", "The"]
    cli.main(["train", "simple-gpt", *options, "--device", "cpu", "--out", str(out)])
    tokenizer = load_model.load_run(out)[1]
    assert tokenizer.to_json() == load_model.load_run(simple_gpt)[1].to_json()
    whole = batches.split_tokens(tokenizer.encode(TEXTS["clinic"]), 145, held_out=0.0)[0]
    losses = [
        EvalSet(whole, 1, 1).mean_loss(load_model.load_run(folder)[0], torch.float32, World.from_environment())
        for folder in (simple_gpt, out)
    ]
    assert losses[0] > 3.0
    assert losses[1] < 0.05
    asked = ("--prompt", "The patient", "--max-new-tokens", str(len(CLINIC) - len("The patient")), "--temperature", "0")
    assert generated(capsys, out, *asked) == CLINIC


@pytest.mark.parametrize("name", ["simple-gpt", "word-gpt"])
def test_adam_is_adamw_without_decay(name: str):
    recipe = RECIPES[name]
    assert (recipe.optimizer, recipe.weight_decay, recipe.beta1, recipe.beta2) == ("adamw", 0.0, 0.9, 0.999)
    assert (recipe.learning_rate, recipe.schedule, recipe.warmup_steps, recipe.grad_clip) == (1e-3, "constant", 0, 0.0)


def test_shakespeare_char_is_nanogpts_of_the_device_s_size():
    """The two character models of its README, and its way of training them."""
    large, small = (recipes.recipe("shakespeare-char", torch.device(kind)) for kind in ("cuda", "cpu"))
    for recipe, shape, dropout, amount in (
        (large, (6, 6, 384, 256), 0.2, (5000, 64)),
        (small, (4, 4, 128, 64), 0.0, (2000, 12)),
    ):
        model = recipe.model
        assert (model.n_layer, model.n_head, model.n_embd, model.block_size, model.dropout) == (*shape, dropout)
        assert (model.activation, model.norm_position, model.position, model.bias) == ("gelu", "pre", "learned", False)
        assert model.tie_weights
        assert (recipe.steps, recipe.batch_size) == amount
        assert (recipe.data, recipe.tokenizer, recipe.held_out) == ("shakespeare", "char", 0.1)
        assert (recipe.learning_rate, recipe.min_learning_rate, recipe.warmup_steps) == (1e-3, 1e-4, 100)
        assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.grad_clip) == (0.9, 0.99, 0.1, 1.0)


SIZES = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


@pytest.mark.parametrize("name", SIZES)
def test_gpt2s_sizes(name: str):
    recipe = RECIPES[name]
    assert recipe.model == dataclasses.replace(PRESETS[name], pad_vocab_size_to=128)
    with torch.device("meta"):
        model = GPT(recipe.model, "eager")
    assert model.get_num_params(non_embedding=False) == operators.parameters(recipe.model) == SIZES[name]
    assert (recipe.optimizer, recipe.weight_decay, recipe.tokenizer) == ("adamw", 0.1, "gpt2")
    assert recipe.batch_size * recipe.model.block_size == 491_520
    assert recipe.min_learning_rate == pytest.approx(recipe.learning_rate / 10)


# of Brown et al. 2020, table 2.1, beside the sequences that go through the model at a time
PRETRAINING = {
    "gpt2-124m": (6e-4, 12),
    "gpt2": (6e-4, 12),
    "gpt2-medium": (3e-4, 6),
    "gpt2-large": (2.5e-4, 4),
    "gpt2-xl": (2e-4, 3),
}


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_is_nanogpts(name: str):
    recipe = RECIPES[name]
    assert (recipe.learning_rate, recipe.batch_size / recipe.accumulation) == PRETRAINING[name]
    assert (recipe.steps, recipe.warmup_steps, recipe.schedule) == (600_000, 2000, "cosine")
    assert (recipe.beta1, recipe.beta2, recipe.grad_clip, recipe.held_out) == (0.9, 0.95, 1.0, 0.1)


def test_the_book_s_124m():
    """163 million, as its head is another matrix than the embedding."""
    recipe = RECIPES["gpt2-124m"]
    with torch.device("meta"):
        untied, tied = (
            GPT(GPTConfig.from_dict(recipes.GPT_CONFIG_124M, tie_weights=tie), "eager") for tie in (False, True)
        )
    assert recipe.model == dataclasses.replace(untied.config, pad_vocab_size_to=128)
    assert untied.get_num_params(non_embedding=False) == operators.parameters(recipe.model) == 163_009_536
    assert tied.get_num_params(non_embedding=False) == 124_412_160
    assert SIZES["gpt2"] - 124_412_160 == 12 * 3 * 768  # the biases of queries, keys and values
    assert tied.transformer.h[0].attn.c_attn.bias is None
    assert tied.config.dropout == 0.1


def test_generation_ends_with_gpt2s_end_of_text():
    """Token 50256, which is not in the text; what stands after it is another document."""
    tokenizer = TiktokenTokenizer(with_end_at_50256())
    model = follower({ord("a"): ord("b"), ord("b"): ord("."), ord("."): 50256, 50256: ord("a")})
    greedy = Sampling(temperature=0.0)
    assert generate_text(model, tokenizer, "a", 10, greedy) == "b."
    (searched,) = texts.search(model, tokenizer, ["a"], 10, BeamSearch(3))
    assert (searched.text, searched.tokens, searched.finished) == ("b.", [98, 46, 50256], True)
    assert model.generate(torch.tensor([[97]]), 10, 0.0, stop_tokens=[50256])[0].tolist() == [97, 98, 46, 50256]
    assert model.generate(torch.tensor([[97]]), 6, 0.0)[0].tolist() == [97, 98, 46, 50256, 97, 98, 46]


@torch.no_grad()
def follower(successors: dict[int, int]) -> GPT:
    """A GPT of GPT-2's vocabulary after each of whose tokens another one is the likeliest."""
    config = GPTConfig(
        block_size=16, vocab_size=50257, n_layer=1, n_head=1, n_embd=8, position="none", tie_weights=False
    )
    model = GPT(config, "eager").eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.zero_()  # blocks add nothing
    for column, (token, successor) in enumerate(successors.items()):
        model.transformer.wte.weight[token, column] = 1.0
        model.lm_head.weight[successor, column] = 1.0
    return model
