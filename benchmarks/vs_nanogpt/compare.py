"""Train the models of nanoGPT's README with gptfast and with nanoGPT: `python -m benchmarks.vs_nanogpt.compare`.

nanoGPT runs its own train.py, unchanged, in float32; gptfast runs its command line with its defaults. For the speed
the two take short turns, and the first one alternates; for the loss each trains once to the end. The results are
FOLDER/<device>/recipes.json, which `benchmarks.report` accepts beside its own files.

A timed step is all of it: batch, forward, backward, clipping, optimizer, and reading the loss. The first step is left
out, and so are evaluations: gptfast's summary excludes them, and nanoGPT's iterations that include one do not count.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measuring import machine
from benchmarks.measuring.processes import RunError, run_command, run_process
from benchmarks.measuring.timing import percentiles
from benchmarks.reporting import units
from benchmarks.reporting.markdown import grid
from gptfast import devices
from gptfast.checkpoint.atomic_files import read_json
from gptfast.data import corpus
from gptfast.training import recipes
from gptfast.training.config import TrainConfig

NANOGPT, GPTFAST = SIDES = ("nanoGPT", "gptfast")
ROOT = Path(__file__).parents[2]
CONFIG = "config/train_shakespeare_char.py"
FILES = ("train.py", "model.py", "configurator.py", CONFIG)  # of nanoGPT
EVAL_INTERVAL = 250


@dataclass(frozen=True)
class Recipe:
    """A model that both sides train.

    Attributes:
        preset: gptfast's name.
        settings: nanoGPT's settings beyond `CONFIG`, as its README gives them.
        steps: steps of a turn for the speed.
        loss_steps: steps of the run for the loss.
        eval_batches: batches of each split for the loss; nanoGPT draws them at random.
    """

    preset: str
    settings: dict[str, Any]
    steps: int
    loss_steps: int
    eval_batches: int

    @property
    def config(self) -> TrainConfig:
        return recipes.RECIPES[self.preset]


_README_CPU = {
    "device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 1, "block_size": 64, "batch_size": 12,
    "n_layer": 4, "n_head": 4, "n_embd": 128, "max_iters": 2000, "lr_decay_iters": 2000, "dropout": 0.0,
}  # fmt: skip
# the README's 20 batches leave the loss uncertain in its second decimal: ten times as many
RECIPES = {
    "cpu": Recipe("shakespeare-char-cpu", _README_CPU, steps=200, loss_steps=2000, eval_batches=200),
    "char": Recipe("shakespeare-char-gpu", {}, steps=6, loss_steps=300, eval_batches=20),
}


@dataclass(frozen=True)
class Run:
    """A run of a recipe: for the speed, or with `eval_batches` for the loss."""

    recipe: Recipe
    device: str
    steps: int
    eval_batches: int = 0

    @property
    def iterations(self) -> int:
        """Iterations of nanoGPT, which evaluates before an iteration: a loss after the last step takes one more."""
        return self.steps + (1 if self.eval_batches else 0)

    @property
    def eval_interval(self) -> int:
        """Steps between evaluations; a run for the speed evaluates only at its ends."""
        return EVAL_INTERVAL if self.eval_batches and self.steps % EVAL_INTERVAL == 0 else self.steps

    def nanogpt_command(self) -> list[str]:
        """Arguments of Python: the README's, in float32 and without torch.compile."""
        settings = self.recipe.settings | {
            "device": self.device,
            "compile": False,
            "dtype": "float32",
            "log_interval": 1,  # prints the time of each iteration
            "max_iters": self.iterations - 1,  # train.py runs one more
            "eval_interval": self.eval_interval,
            "eval_iters": self.eval_batches or 1,  # train.py always evaluates before its first iteration
        }
        if self.eval_batches:
            settings["lr_decay_iters"] = self.steps
        return ["train.py", CONFIG, *(f"--{name}={value}" for name, value in settings.items())]

    def gptfast_command(self, data: str, out: str) -> list[str]:
        """Arguments of `gptfast`: the preset with this run's length and evaluations."""
        places = {"data": data, "out": out, "device": self.device}
        lengths = {"steps": self.steps, "eval-interval": self.eval_interval, "eval-batches": self.eval_batches or 1}
        options = [word for name, value in (places | lengths).items() for word in (f"--{name}", str(value))]
        return ["train", self.recipe.preset, *options]

    def commands(self) -> dict[str, str]:
        """Both command lines as a user types them."""
        nanogpt, gptfast = self.nanogpt_command(), self.gptfast_command("FILE", "RUN")
        return {NANOGPT: f"python {' '.join(nanogpt)}", GPTFAST: f"gptfast {' '.join(gptfast)}"}


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        tokens_per_second: over all timed steps.
        seconds: of the whole process.
        val_loss: lowest validation loss of the run; None for the speed.
        train_loss: training loss of the same evaluation.
    """

    tokens_per_second: float
    seconds: float
    val_loss: float | None = None
    train_loss: float | None = None


class Race:
    """Both sides on one text, with a copy of nanoGPT's files in a folder of this run.

    Args:
        folder: empty folder for the copy and the runs' output.
        checkout: folder of nanoGPT.
        data: text file.
        threads: threads of both sides; PyTorch's default if None.

    Raises:
        ValueError: `checkout` or `data` is not what it must be.
    """

    def __init__(self, folder: Path, checkout: Path, data: Path, threads: int | None) -> None:
        self.folder, self.data, self.threads = folder, data.resolve(), threads
        self.nanogpt_folder = folder / "nanogpt"
        for name in FILES:
            if not (checkout / name).is_file():
                raise ValueError(f"{checkout} has no {name}; --nanogpt takes a checkout of nanoGPT")
            copy = self.nanogpt_folder / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkout / name, copy)
        if not data.is_file():
            raise ValueError(f"no such file: {data}; --data takes a text file")
        self.text = corpus.load_text(str(self.data))
        self.vocab_size, self.held_out = write_tokens(self.text, self.nanogpt_folder / "data" / "shakespeare_char")

    def checksums(self) -> dict[str, str]:
        """SHA-256 of nanoGPT's files, which identify its version."""
        return {name: hashlib.sha256((self.nanogpt_folder / name).read_bytes()).hexdigest() for name in FILES}

    def run(self, side: str, run: Run) -> Outcome:
        """Train with "nanoGPT" or "gptfast". Raises RunError if the run fails or differs from the requested one."""
        if side == NANOGPT:
            command = [sys.executable, *run.nanogpt_command()]
            printed, seconds = run_process(NANOGPT, command, self.nanogpt_folder, self.threads)
            if not re.search(rf"^found vocab_size = {self.vocab_size} ", printed, re.MULTILINE):
                raise RunError(f"nanoGPT's model is another: it does not print found vocab_size = {self.vocab_size}")
            return nanogpt_outcome(printed, run, seconds)
        with tempfile.TemporaryDirectory(dir=self.folder) as parent:
            out = Path(parent, "run")
            command = [sys.executable, "-m", "gptfast", *run.gptfast_command(str(self.data), str(out))]
            _, seconds = run_process(GPTFAST, command, ROOT, self.threads)
            if not (out / "summary.json").is_file():
                raise RunError("gptfast wrote no summary.json")
            return gptfast_outcome(read_json(out / "summary.json"), run, seconds)


def write_tokens(text: str, folder: Path) -> tuple[int, int]:
    """Write the files of nanoGPT's prepare.py: a token for each character, the first 90% for training.

    Returns:
        The vocabulary size, and the number of validation tokens.
    """
    characters = sorted(set(text))
    numbers = {character: number for number, character in enumerate(characters)}
    tokens = np.array([numbers[character] for character in text], dtype=np.uint16)
    boundary = int(len(tokens) * 0.9)
    folder.mkdir(parents=True)
    tokens[:boundary].tofile(folder / "train.bin")
    tokens[boundary:].tofile(folder / "val.bin")
    # train.py reads the vocabulary size from here only: without it the model has GPT-2's 50,304 tokens
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(characters)}))
    return len(characters), len(tokens) - boundary


def nanogpt_outcome(printed: str, run: Run, seconds: float) -> Outcome:
    """Parse the output of train.py.

    Raises:
        RunError: another batch size, missing iterations, or a loss that is not finite.
    """
    config = run.recipe.config
    tokens = config.batch_size * config.model.block_size
    printed_tokens = re.search(r"^tokens per iteration will be: ([\d,]+)$", printed, re.MULTILINE)
    if printed_tokens is None or int(printed_tokens[1].replace(",", "")) != tokens:
        given = "an unknown number of" if printed_tokens is None else printed_tokens[1]
        raise RunError(f"nanoGPT's batch is another: {given} tokens, gptfast's has {tokens:,}")
    iterations = re.findall(r"^iter (\d+): loss \S+, time ([\d.]+)ms", printed, re.MULTILINE)
    times = {int(number): float(time) / 1000 for number, time in iterations}
    if sorted(times) != list(range(run.iterations)):
        raise RunError(f"nanoGPT printed the times of {len(times)} iterations; {run.iterations} were requested")
    losses = re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)$", printed, re.MULTILINE)
    evaluations = {int(number): (float(val), float(train)) for number, train, val in losses}
    timed = [time for number, time in times.items() if number > 0 and number not in evaluations]
    if not sum(timed) > 0:
        raise RunError("nanoGPT timed no iteration without an evaluation")
    speed = tokens * len(timed) / sum(timed)
    if not run.eval_batches:
        return Outcome(speed, seconds)
    if run.steps not in evaluations:
        raise RunError(f"nanoGPT printed no loss of step {run.steps}")
    return Outcome(speed, seconds, *(_finite(NANOGPT, loss, "loss") for loss in min(evaluations.values())))


def gptfast_outcome(summary: dict[str, Any], run: Run, seconds: float) -> Outcome:
    """Read a run's summary.json.

    Raises:
        RunError: no finite speed or loss, or the run ended early.
    """
    if summary.get("steps") != run.steps:
        raise RunError(f"gptfast did {summary.get('steps')} steps; {run.steps} were requested")
    names = ("val_loss", "train_loss") if run.eval_batches else ()
    speed = _finite(GPTFAST, summary.get("tokens_per_second"), "speed")
    return Outcome(speed, seconds, *(_finite(GPTFAST, summary.get(name), "loss") for name in names))


def _finite(side: str, value: Any, what: str) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RunError(f"the {what} of {side} is {value}; accepted: a finite number")
    return float(value)


def compare(
    nanogpt: str,
    data: str,
    out: str,
    recipes: tuple[str, ...] = tuple(RECIPES),
    rounds: int = 5,
    steps: int | None = None,
    loss_steps: int | None = None,
    eval_batches: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Compare gptfast's speed and loss with nanoGPT's on its own recipes, each side by its own command line.

    Args:
        nanogpt: folder with a checkout of nanoGPT, which is not changed.
        data: text file to train on, such as Tiny Shakespeare.
        out: folder of results; the command writes OUT/<device>/recipes.json.
        recipes: cpu is the README's model for a laptop, char its model of 6 layers, 384 wide.
        rounds: turns of each side, for the speed.
        steps: steps of a turn, the first of which is not timed; default 200 for cpu and 6 for char.
        loss_steps: steps of the run for the loss, 0 to skip it; default 2000 for cpu (minutes), 300 for char (an hour).
        eval_batches: batches of each split for the loss; default 200 for cpu and 20 for char.
        device: cpu, cuda, cuda:N or mps, for both sides.
        threads: threads of both sides; PyTorch's default if not given.
    """
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown or not recipes:
        raise ValueError(f"unknown recipe {' '.join(unknown)!r}; accepted: {', '.join(RECIPES)}")
    given: dict[str, int | None] = {"rounds": rounds, "threads": threads}
    lengths = {"steps": steps, "loss_steps": loss_steps, "eval_batches": eval_batches}
    changes: dict[str, Any] = {name: value for name, value in lengths.items() if value is not None}
    least = {"rounds": 1, "steps": 2, "loss_steps": 0, "eval_batches": 1, "threads": 1}
    for name, value in (given | changes).items():
        if value is not None and value < least[name]:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least[name]}, got {value}")
    for name in recipes:
        warmup = RECIPES[name].config.warmup_steps
        if loss_steps is not None and 0 != loss_steps <= warmup:  # nanoGPT divides by the steps after the warm-up
            raise ValueError(f"--loss-steps must be 0 or more than the warm-up's {warmup}, got {loss_steps}")
    on = devices.resolve(device)
    path = Path(out, machine.slug(on), "recipes.json")
    _require_writable(path)
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        race = Race(Path(folder), Path(nanogpt), Path(data), threads)
        for name in recipes:
            length = RECIPES[name].config.model.block_size
            if race.held_out <= length:
                raise ValueError(
                    f"{race.data} is too short: {race.held_out} characters for validation; "
                    f"{RECIPES[name].preset} needs more than {length}"
                )
        if threads is not None:
            torch.set_num_threads(threads)
        sha256 = hashlib.sha256(race.text.encode()).hexdigest()
        text = {"characters": len(race.text), "vocab_size": race.vocab_size, "sha256": sha256}
        results: dict[str, Any] = {}
        content = {"nanogpt": {"sha256": race.checksums()}, "data": text, "recipes": results}
        content = machine.result_head(on) | content
        for name in dict.fromkeys(recipes):
            recipe = replace(RECIPES[name], **changes)
            speed_run = Run(recipe, device, recipe.steps)
            loss_run = Run(recipe, device, recipe.loss_steps, recipe.eval_batches)
            results[name] = _settings(speed_run, loss_run, rounds, threads) | {"speed": None, "loss": None}
            results[name]["speed"] = compare_speed(race, name, speed_run, rounds)
            machine.save_results(path, content)
            if loss_run.steps:
                results[name]["loss"] = compare_loss(race, name, loss_run)
                machine.save_results(path, content)
    print(f"\n{table(results)}\n\n{path}")


def _require_writable(path: Path) -> None:
    """Reject a bad folder before hours of measuring; this creates nothing."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {parent} is not a writable folder")


def _settings(speed: Run, loss: Run, rounds: int, threads: int | None) -> dict[str, Any]:
    """Settings that both sides share, and their command lines."""
    config = speed.recipe.config
    dtype = devices.resolve_dtype(config.dtype, devices.resolve(speed.device))
    return {
        "settings": {
            "preset": speed.recipe.preset,
            "batch_size": config.batch_size,
            "block_size": config.model.block_size,
            "device": speed.device,
            "threads": threads,
            "dtype": {NANOGPT: "float32", GPTFAST: str(dtype).removeprefix("torch.")},
            "rounds": rounds,
            "steps": speed.steps,
            "loss_steps": loss.steps,
            "eval_batches": loss.eval_batches,
        },
        "commands": {"speed": speed.commands(), "loss": loss.commands() if loss.steps else None},
    }


def compare_speed(race: Race, name: str, run: Run, rounds: int) -> dict[str, Any]:
    """Measure tokens per second of both sides in turns, and the ratio of each round."""
    measured: list[dict[str, Any]] = []
    for number in range(rounds):
        order = SIDES[:: -1 if number % 2 else 1]
        speeds = {side: race.run(side, run).tokens_per_second for side in order}
        measured.append({"order": list(order), **speeds, "ratio": speeds[GPTFAST] / speeds[NANOGPT]})
        sentence = ", ".join(f"{side} {speed:,.0f} tokens/s" for side, speed in speeds.items())
        print(f"{name}, round {number + 1} of {rounds}: {sentence}", flush=True)
    return {
        "tokens_per_second": {side: percentiles([one[side] for one in measured]) for side in SIDES},
        "ratio": percentiles([one["ratio"] for one in measured]),
        "rounds": measured,
    }


def compare_loss(race: Race, name: str, run: Run) -> dict[str, Any]:
    """Train each side once and compare the lowest validation losses.

    The speeds of these runs are left out: they were hours apart.
    """
    losses: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        print(f"{name}, {run.steps} steps for the loss: {side}", end="", flush=True)
        outcome = race.run(side, run)
        losses[side] = {"val_loss": outcome.val_loss, "train_loss": outcome.train_loss}
        print(f" {outcome.val_loss:.4f} after {outcome.seconds:.0f} s", flush=True)
    return {**losses, "difference": losses[GPTFAST]["val_loss"] - losses[NANOGPT]["val_loss"]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Format all recipes in Markdown."""
    speeds, losses = ([f"{side}, {what}" for side in SIDES] for what in ("tokens/s", "validation loss"))
    lines = []
    for name, result in results.items():
        speed, loss = result["speed"], result["loss"]
        p20, median, p80 = (units.ratio(speed["ratio"][part]) for part in ("p20", "median", "p80"))
        cells = [name, *(units.count(speed["tokens_per_second"][side]["median"]) for side in SIDES)]
        cells += [median, f"{p20} to {p80}", *[units.NOTHING] * 3]
        if loss is not None:
            cells[-3:] = [*(f"{loss[side]['val_loss']:.4f}" for side in SIDES), f"{loss['difference']:+.4f}"]
        lines.append(cells)
    return grid(["recipe", *speeds, "ratio", "p20 to p80", *losses, "difference"], lines)


def passage(content: dict[str, Any]) -> str:
    """Format results for a document: the table, and the machine it was measured on."""
    measured_on = content["machine_info"]["gptfast"]
    versions = f"PyTorch {measured_on['torch']}, Python {measured_on['python']}, {measured_on['threads']} threads"
    when = f"{content['datetime'][:10]} at commit {content['commit_info']['id'][:10]}"
    machine_line = f"{measured_on['device']}, gptfast {measured_on['gptfast']}, {versions}; measured {when}."
    return f"{table(content['recipes'])}\n\n{machine_line}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; exit status 2 for arguments that cannot be measured, 1 if a run fails."""
    run_command(compare, "benchmarks.vs_nanogpt.compare", arguments)


if __name__ == "__main__":
    main()
