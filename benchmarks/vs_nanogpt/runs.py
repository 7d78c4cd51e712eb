"""Runs of nanoGPT's train.py and of gptfast's command line with the same recipe: their commands, and what they tell.

On both sides a step is all of it: the batch, forward, backward, clipping, the optimizer, and reading its loss. On both
sides the first step is left out, which sets things up, and so are evaluations with what is saved after them: the speed
in gptfast's summary is without them, and of nanoGPT, whose iterations have the time of an evaluation that comes before,
those are left out whole. Printing is in nanoGPT's times, tens of microseconds, and in gptfast's not.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring.processes import RunError, run_process
from gptfast.checkpoint.atomic_files import read_json
from gptfast.data import corpus
from gptfast.training import recipes
from gptfast.training.config import TrainConfig

NANOGPT, GPTFAST = "nanoGPT", "gptfast"
ROOT = Path(__file__).parents[2]
CONFIG = "config/train_shakespeare_char.py"
FILES = ("train.py", "model.py", "configurator.py", CONFIG)
EVAL_INTERVAL = 250  # of the recipes, on both sides
_ITERATION = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.MULTILINE)
_EVALUATION = re.compile(r"^step (\d+): train loss (\S+), val loss (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Recipe:
    """A model that both train.

    Args:
        preset: gptfast's name of it.
        nanogpt: settings beyond `CONFIG`, as nanoGPT's README gives them.
        steps: of a run for the speed; the first is not timed.
        loss_steps: of the run for the loss.
        eval_batches: of each split, for the loss; nanoGPT draws them at random.
    """

    preset: str
    nanogpt: dict[str, Any]
    steps: int
    loss_steps: int
    eval_batches: int

    @property
    def config(self) -> TrainConfig:
        return recipes.RECIPES[self.preset]

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.model.block_size


_README_CPU = {
    "device": "cpu",
    "compile": False,
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "max_iters": 2000,
    "lr_decay_iters": 2000,
    "dropout": 0.0,
}
# a loss by the README's 20 batches of 12 short sequences is uncertain in its second decimal: ten times as many
RECIPES = {
    "cpu": Recipe("shakespeare-char-cpu", _README_CPU, steps=200, loss_steps=2000, eval_batches=200),
    "char": Recipe("shakespeare-char-gpu", {}, steps=6, loss_steps=300, eval_batches=20),
}


@dataclass(frozen=True)
class Plan:
    """What a run is for: the speed, or with `eval_batches` the loss."""

    steps: int
    eval_batches: int = 0

    @property
    def iterations(self) -> int:
        """Those of nanoGPT, which evaluates before an iteration: for the loss after the last step it needs one more."""
        return self.steps + (1 if self.eval_batches else 0)

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations: one is after the last step, and a run for the speed has none in its midst."""
        return EVAL_INTERVAL if self.eval_batches and self.steps % EVAL_INTERVAL == 0 else self.steps


@dataclass(frozen=True)
class Outcome:
    """What a run told.

    Args:
        tokens_per_second: over all timed steps together.
        val_loss: the lowest of the run's evaluations; None of a run for the speed.
        train_loss: of the same evaluation.
        seconds: of the whole process, from its start to its end.
    """

    tokens_per_second: float
    val_loss: float | None
    train_loss: float | None
    seconds: float


def nanogpt_command(recipe: Recipe, plan: Plan, device: str) -> list[str]:
    """The arguments of Python: README's, in float32 and without torch.compile, for `plan`."""
    changes = {
        "device": device,
        "compile": False,
        "dtype": "float32",
        "log_interval": 1,  # a time for each iteration
        "max_iters": plan.iterations - 1,  # of which it does one more
        "eval_interval": plan.eval_interval,
        "eval_iters": plan.eval_batches or 1,  # it always evaluates before its first iteration
    }
    if plan.eval_batches:
        changes["lr_decay_iters"] = plan.steps
    settings = recipe.nanogpt | changes
    return ["train.py", CONFIG, *(f"--{name}={value}" for name, value in settings.items())]


def gptfast_command(recipe: Recipe, plan: Plan, device: str, data: str, run: str) -> list[str]:
    """The arguments of `gptfast`: the preset's own settings, for `plan`."""
    options = {
        "data": data,
        "out": run,
        "device": device,
        "steps": plan.steps,
        "eval_interval": plan.eval_interval,
        "eval_batches": plan.eval_batches or 1,
    }
    words = (word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value)))
    return ["train", recipe.preset, *words]


def shown(recipe: Recipe, plan: Plan, device: str) -> dict[str, str]:
    """Both command lines as a reader would type them."""
    return {
        NANOGPT: " ".join(["python", *nanogpt_command(recipe, plan, device)]),
        GPTFAST: " ".join(["gptfast", *gptfast_command(recipe, plan, device, "FILE", "RUN")]),
    }


class Runs:
    """Runs both on one text, in a folder of their own.

    Args:
        folder: empty, for a copy of the files of nanoGPT and for what the runs write.
        checkout: of nanoGPT.
        data: the text, a file.
        device: of both.
        threads: of both; None leaves PyTorch's default.

    Raises:
        ValueError: no such checkout, or no such text.
    """

    def __init__(self, folder: Path, checkout: Path, data: Path, device: str, threads: int | None) -> None:
        self.folder, self.data, self.device, self.threads = folder, data.resolve(), device, threads
        if not checkout.is_dir():
            raise ValueError(f"no such folder: {checkout}; --nanogpt takes a checkout of nanoGPT")
        for name in FILES:
            if not (checkout / name).is_file():
                raise ValueError(f"{checkout} has no {name}; --nanogpt takes a checkout of nanoGPT")
        if not data.is_file():
            raise ValueError(f"no such file: {data}; --data takes a text file")
        self.text = corpus.load_text(str(self.data))
        self.nanogpt_folder = folder / "nanogpt"
        for name in FILES:
            copy = self.nanogpt_folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkout / name, copy)
        self.vocab_size, self.held_out = write_tokens(self.text, self.nanogpt_folder / "data" / "shakespeare_char")

    def require_length(self, recipe: Recipe) -> None:
        """Raise ValueError if the text is too short for a model."""
        length = recipe.config.model.block_size
        if self.held_out <= length:
            raise ValueError(
                f"{self.data} is too short: {self.held_out} characters to validate on, {recipe.preset} needs more than "
                f"{length}"
            )

    def checksums(self) -> dict[str, str]:
        """SHA-256 of nanoGPT's files by name: which nanoGPT it is, and that it is unchanged."""
        return {name: hashlib.sha256((self.nanogpt_folder / name).read_bytes()).hexdigest() for name in FILES}

    def nanogpt(self, recipe: Recipe, plan: Plan) -> Outcome:
        """Run nanoGPT's train.py. Raises RunError if it fails or is not what was asked for."""
        command = [sys.executable, *nanogpt_command(recipe, plan, self.device)]
        printed, seconds = run_process(NANOGPT, command, self.nanogpt_folder, self.threads)
        found = re.search(r"^found vocab_size = (\d+) ", printed, re.MULTILINE)
        if found is None or int(found[1]) != self.vocab_size:
            raise RunError(f"nanoGPT's model is another: it does not say that it found vocab_size = {self.vocab_size}")
        return nanogpt_outcome(printed, recipe, plan, seconds)

    def gptfast(self, recipe: Recipe, plan: Plan) -> Outcome:
        """Run `gptfast train`. Raises RunError if it fails or is not what was asked for."""
        with tempfile.TemporaryDirectory(dir=self.folder) as parent:
            run = Path(parent, "run")
            arguments = gptfast_command(recipe, plan, self.device, str(self.data), str(run))
            _, seconds = run_process(GPTFAST, [sys.executable, "-m", "gptfast", *arguments], ROOT, self.threads)
            if not (run / "summary.json").is_file():
                raise RunError("gptfast wrote no summary.json")
            return gptfast_outcome(read_json(run / "summary.json"), plan, seconds)


def write_tokens(text: str, folder: Path) -> tuple[int, int]:
    """Write what nanoGPT's prepare.py would: a token for each character, the first 90% of them to train on.

    Returns:
        The vocabulary's size, and the number of tokens to validate on.
    """
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = np.array([numbers[character] for character in text], dtype=np.uint16)
    boundary = int(len(tokens) * 0.9)
    folder.mkdir(parents=True)
    tokens[:boundary].tofile(folder / "train.bin")
    tokens[boundary:].tofile(folder / "val.bin")
    # train.py takes the vocabulary's size from no other place: without it the model has GPT-2's 50,304 tokens
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": len(characters)}, file)
    return len(characters), len(tokens) - boundary


def nanogpt_outcome(printed: str, recipe: Recipe, plan: Plan, seconds: float) -> Outcome:
    """Read what train.py printed.

    Raises:
        RunError: it is of another size, iterations are missing, or a loss is no finite number.
    """
    stated = re.search(r"^tokens per iteration will be: ([\d,]+)$", printed, re.MULTILINE)
    if stated is None or int(stated[1].replace(",", "")) != recipe.tokens_per_step:
        given = "an unknown number of" if stated is None else stated[1]
        raise RunError(f"nanoGPT's batch is another: {given} tokens, gptfast's has {recipe.tokens_per_step:,}")
    times = {int(number): float(time) / 1000 for number, time in _ITERATION.findall(printed)}
    if sorted(times) != list(range(plan.iterations)):
        raise RunError(f"nanoGPT printed the times of {len(times)} iterations; {plan.iterations} were asked for")
    evaluations = {int(number): (float(val), float(train)) for number, train, val in _EVALUATION.findall(printed)}
    timed = [time for number, time in times.items() if number > 0 and number not in evaluations]
    if not sum(timed) > 0:
        raise RunError("nanoGPT timed no iteration without an evaluation")
    speed = recipe.tokens_per_step * len(timed) / sum(timed)
    if not plan.eval_batches:
        return Outcome(speed, None, None, seconds)
    if plan.steps not in evaluations:
        raise RunError(f"nanoGPT printed no loss of step {plan.steps}")
    val_loss, train_loss = min(evaluations.values())
    return Outcome(speed, _finite(NANOGPT, val_loss), _finite(NANOGPT, train_loss), seconds)


def gptfast_outcome(summary: dict[str, Any], plan: Plan, seconds: float) -> Outcome:
    """Read a run's summary.json.

    Raises:
        RunError: it lacks the speed or a loss, or the run ended early.
    """
    if summary.get("steps") != plan.steps:
        raise RunError(f"gptfast did {summary.get('steps')} steps; {plan.steps} were asked for")
    speed = _finite(GPTFAST, summary.get("tokens_per_second"), "speed")
    if not plan.eval_batches:
        return Outcome(speed, None, None, seconds)
    val_loss, train_loss = (_finite(GPTFAST, summary.get(name)) for name in ("val_loss", "train_loss"))
    return Outcome(speed, val_loss, train_loss, seconds)


def _finite(name: str, value: Any, what: str = "loss") -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RunError(f"the {what} of {name} is {value}; a finite number was expected")
    return float(value)
