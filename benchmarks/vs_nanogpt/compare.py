"""Trains the models of nanoGPT's README with gptfast and with nanoGPT: `python -m benchmarks.vs_nanogpt.compare`.

nanoGPT runs its own train.py, unchanged, in float32; gptfast runs its command line with its defaults. For the speed
they take short turns, each first in every other round; for the loss each trains once to the end. Results are written to
FOLDER/<device>/recipes.json, which `benchmarks.report` accepts beside the others; it has no rows of theirs.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import tyro

from benchmarks.measuring import machine
from benchmarks.measuring.processes import exit_on_error
from benchmarks.measuring.timing import percentiles
from benchmarks.reporting import units
from benchmarks.reporting.markdown import grid
from benchmarks.vs_nanogpt.runs import GPTFAST, NANOGPT, RECIPES, Outcome, Plan, Recipe, Runs, shown
from gptfast import devices


@dataclass
class Options:
    """Compare gptfast's speed and loss with nanoGPT's on its own recipes, each side by its own command line."""

    nanogpt: str
    """Folder with a checkout of nanoGPT, which stays as it is."""
    data: str
    """Text file to train on, such as Tiny Shakespeare."""
    out: str
    """Folder of results: OUT/<device>/recipes.json is written."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """cpu: the README's model for a laptop; char: its model of 6 layers, 384 wide."""
    rounds: int = 5
    """Turns of each side, for the speed."""
    steps: int | None = None
    """Steps of a turn, the first of which is not timed; by default 200 of cpu and 6 of char."""
    loss_steps: int | None = None
    """Steps of the run for the loss, 0 leaves it out; by default 2000 of cpu, minutes, and 300 of char, an hour."""
    eval_batches: int | None = None
    """Batches of each split that the loss is the mean of; by default 200 of cpu and 20 of char."""
    device: str = "cpu"
    """cpu, cuda, cuda:N or mps, for both sides."""
    threads: int | None = None
    """Of both sides; by default PyTorch's own number."""


class Sides(Protocol):
    """What can be run."""

    def nanogpt(self, recipe: Recipe, plan: Plan) -> Outcome: ...

    def gptfast(self, recipe: Recipe, plan: Plan) -> Outcome: ...


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; exit status 2 for what cannot be measured, 1 if a run fails."""
    options = tyro.cli(Options, prog="python -m benchmarks.vs_nanogpt.compare", args=arguments)
    with exit_on_error("benchmarks.vs_nanogpt.compare"):
        measure(options)


def measure(options: Options) -> None:
    """Run all recipes, print a table and write the results, anew after each recipe's speed and loss.

    Raises:
        ValueError: an option that does not do.
        RuntimeError: a run failed.
        OSError: the results cannot be written.
    """
    _check(options)
    device = devices.resolve(options.device)
    path = Path(options.out, machine.slug(device), "recipes.json")
    _check_writable(path)
    with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
        runs = Runs(Path(folder), Path(options.nanogpt), Path(options.data), options.device, options.threads)
        for name in options.recipes:
            runs.require_length(RECIPES[name])
        content = describe(options, runs, device)
        for name in dict.fromkeys(options.recipes):
            result = content["recipes"][name] = settings(options, RECIPES[name])
            result["speed"] = compare_speed(runs, name, result["settings"]["steps"], options.rounds)
            machine.save_results(path, content)
            if result["settings"]["loss_steps"]:
                result["loss"] = compare_loss(
                    runs, name, result["settings"]["loss_steps"], result["settings"]["eval_batches"]
                )
                machine.save_results(path, content)
    print(f"\n{table(content['recipes'])}\n\n{path}")


def _check(options: Options) -> None:
    unknown = [name for name in options.recipes if name not in RECIPES]
    if unknown or not options.recipes:
        raise ValueError(f"unknown recipe {' '.join(unknown)!r}; accepted: {', '.join(RECIPES)}")
    least = {"rounds": 1, "steps": 2, "eval_batches": 1, "threads": 1}  # of one step, none would be timed
    for name, limit in least.items():
        value = getattr(options, name)
        if value is not None and value < limit:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {limit}, got {value}")
    for name in options.recipes:
        warmup = RECIPES[name].config.warmup_steps
        # a warm-up as long as its decay has nanoGPT divide by zero
        if options.loss_steps is not None and options.loss_steps != 0 and options.loss_steps <= warmup:
            raise ValueError(
                f"--loss-steps must be 0 or more than the {warmup} of the warm-up, got {options.loss_steps}"
            )


def _check_writable(path: Path) -> None:
    """Before hours of measuring, not after; nothing is created yet."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: {there} is no folder that can be written to")


def describe(options: Options, runs: Runs, device: torch.device) -> dict[str, Any]:
    """All of the results that is known before the first run: machine, versions, data."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return {
        **machine.result_head(device),
        "nanogpt": {"sha256": runs.checksums()},
        "data": {
            "characters": len(runs.text),
            "vocab_size": runs.vocab_size,
            "sha256": hashlib.sha256(runs.text.encode()).hexdigest(),
        },
        "recipes": {},
    }


def settings(options: Options, recipe: Recipe) -> dict[str, Any]:
    """A recipe's results before its runs: what is the same on both sides, and both command lines."""
    steps = recipe.steps if options.steps is None else options.steps
    loss_steps = recipe.loss_steps if options.loss_steps is None else options.loss_steps
    eval_batches = recipe.eval_batches if options.eval_batches is None else options.eval_batches
    ours = devices.resolve_dtype(recipe.config.dtype, devices.resolve(options.device))
    return {
        "settings": {
            "preset": recipe.preset,
            "batch_size": recipe.config.batch_size,
            "block_size": recipe.config.model.block_size,
            "device": options.device,
            "threads": options.threads,
            "dtype": {NANOGPT: "float32", GPTFAST: str(ours).removeprefix("torch.")},
            "rounds": options.rounds,
            "steps": steps,
            "loss_steps": loss_steps,
            "eval_batches": eval_batches,
        },
        "commands": {
            "speed": shown(recipe, Plan(steps), options.device),
            "loss": shown(recipe, Plan(loss_steps, eval_batches), options.device) if loss_steps else None,
        },
        "speed": None,
        "loss": None,
    }


def compare_speed(sides: Sides, name: str, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of both in turns, and the ratio of each round; who is first changes with every round."""
    recipe, plan = RECIPES[name], Plan(steps)
    turns = {NANOGPT: sides.nanogpt, GPTFAST: sides.gptfast}
    measured: list[dict[str, Any]] = []
    for number in range(rounds):
        order = list(turns)[:: -1 if number % 2 else 1]
        speeds = {side: turns[side](recipe, plan).tokens_per_second for side in order}
        measured.append({"order": order, **speeds, "ratio": speeds[GPTFAST] / speeds[NANOGPT]})
        print(f"{name}, round {number + 1} of {rounds}: {_sentence(speeds)}", flush=True)
    return {
        "tokens_per_second": {side: percentiles([one[side] for one in measured]) for side in turns},
        "ratio": percentiles([one["ratio"] for one in measured]),
        "rounds": measured,
    }


def _sentence(speeds: dict[str, float]) -> str:
    return ", ".join(f"{side} {speed:,.0f} tokens/s" for side, speed in speeds.items())


def compare_loss(sides: Sides, name: str, steps: int, eval_batches: int) -> dict[str, Any]:
    """The lowest validation loss of a run of each side, and what gptfast's is above nanoGPT's.

    Their speeds are left out: one long run after the other, they compare the machine's hours and not the sides.
    """
    recipe, plan = RECIPES[name], Plan(steps, eval_batches)
    losses: dict[str, dict[str, Any]] = {}
    for side, run in ((NANOGPT, sides.nanogpt), (GPTFAST, sides.gptfast)):
        print(f"{name}, {steps} steps for the loss: {side}", end="", flush=True)
        outcome = run(recipe, plan)
        losses[side] = {"val_loss": outcome.val_loss, "train_loss": outcome.train_loss}
        print(f" {outcome.val_loss:.4f} after {outcome.seconds:.0f} s", flush=True)
    return {**losses, "difference": losses[GPTFAST]["val_loss"] - losses[NANOGPT]["val_loss"]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """All recipes in Markdown."""
    columns = ("recipe", "nanoGPT, tokens/s", "gptfast, tokens/s", "ratio", "p20 to p80")
    return grid(
        (*columns, "nanoGPT, validation loss", "gptfast, validation loss", "difference"),
        [(name, *_speed_cells(result["speed"]), *_loss_cells(result["loss"])) for name, result in results.items()],
    )


def passage(content: dict[str, Any]) -> str:
    """What a document shows of a file of results: the table, and on what it was measured."""
    measured_on = content["machine_info"]["gptfast"]
    versions = f"PyTorch {measured_on['torch']}, Python {measured_on['python']}, {measured_on['threads']} threads"
    when = f"{content['datetime'][:10]} at commit {content['commit_info']['id'][:10]}"
    return (
        f"{table(content['recipes'])}\n\n{measured_on['device']}, gptfast {measured_on['gptfast']}, {versions}; "
        f"measured {when}.\n"
    )


def _speed_cells(speed: dict[str, Any]) -> tuple[str, ...]:
    medians = (units.count(speed["tokens_per_second"][side]["median"]) for side in (NANOGPT, GPTFAST))
    ratio = {name: units.ratio(value) for name, value in speed["ratio"].items()}
    return (*medians, ratio["median"], f"{ratio['p20']} to {ratio['p80']}")


def _loss_cells(loss: dict[str, Any] | None) -> tuple[str, ...]:
    if loss is None:
        return (units.NOTHING,) * 3
    return (*(f"{loss[side]['val_loss']:.4f}" for side in (NANOGPT, GPTFAST)), f"{loss['difference']:+.4f}")


if __name__ == "__main__":
    main()
