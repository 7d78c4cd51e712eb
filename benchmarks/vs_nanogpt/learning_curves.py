"""Effect of one option on learning curves: `python -m benchmarks.vs_nanogpt.learning_curves RECIPE --option backend`.

Trains a recipe once for each value of one option, all else and every batch the same, and holds the losses against
those of the first. Another seed's run of the first value shows what chance alone makes of them. Options that this
command does not know are those of `gptfast train`, for all runs. Results are
FOLDER/<device>/learning-<recipe>-<option>.json, which `benchmarks.report` accepts beside the others, and a picture of
the same name.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.measuring import machine
from benchmarks.measuring.processes import RunError, exit_on_error, run_process
from benchmarks.reporting import learning
from benchmarks.reporting.markdown import grid
from gptfast import devices
from gptfast.checkpoint.atomic_files import read_json
from gptfast.checkpoint.run_folder import read_log
from gptfast.training import recipes

ROOT = Path(__file__).parents[1]
_OURS = ("data", "out", "device", "seed")  # options of `gptfast train` that this command gives itself


@dataclass
class Options:
    """Train a recipe with several values of one option and compare the losses. Further options are the training's."""

    recipe: tyro.conf.Positional[str]
    """A preset of `gptfast train`."""
    data: str
    """As --data of `gptfast train`."""
    out: str
    """Folder of results: OUT/<device>/ is written to."""
    option: str = "backend"
    """Of `gptfast train`, such as backend, dtype or optimizer."""
    values: tuple[str, ...] = ("eager", "triton")
    """Of the option; the first is what the others are compared with."""
    other_seed: int | None = None
    """Train once more with the first value and this seed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: int = 1337
    """Of weights, batches and dropout."""
    threads: int | None = None
    """Of the runs; by default PyTorch's own number."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and compare; exit status 2 for what cannot be trained, 1 if a run fails."""
    program = "python -m benchmarks.vs_nanogpt.learning_curves"
    options, training = tyro.cli(Options, prog=program, args=arguments, return_unknown_args=True)
    with exit_on_error("benchmarks.vs_nanogpt.learning_curves"):
        measure(options, training)


def measure(options: Options, training: list[str]) -> None:
    """Train all runs, then write results and picture and print a table.

    Args:
        options: of this command.
        training: further ones, of `gptfast train`.

    Raises:
        ValueError: an option that does not do.
        RunError: a run failed.
        OSError: the results cannot be written.
    """
    _check(options, training)
    device = devices.resolve(options.device)
    path = Path(options.out, machine.slug(device), f"learning-{options.recipe}-{options.option}.json")
    path.parent.mkdir(parents=True, exist_ok=True)  # before hours of training, not after
    content = machine.result_head(device) | {
        "recipe": options.recipe,
        "option": options.option,
        "runs": [],
    }
    for label, changes in variants(options).items():
        print(f"training with {options.option} {label}", flush=True)
        content["runs"].append(train(options, label, changes, training))
    machine.save_results(path, content)
    learning.draw(content, path.with_suffix(".png"))
    print(f"\n{passage(content)}\n{path}\n{path.with_suffix('.png')}")


def _check(options: Options, training: list[str]) -> None:
    if options.recipe not in recipes.names():
        raise ValueError(f"unknown recipe {options.recipe!r}; accepted: {', '.join(recipes.names())}")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", options.option) or options.option in _OURS:
        raise ValueError(
            f"--option must be one of `gptfast train`, without dashes before it and none of {', '.join(_OURS)}, "
            f"got {options.option!r}"
        )
    if not options.values or len(set(options.values)) < len(options.values):
        raise ValueError(f"--values must be different values, got {' '.join(options.values) or 'none'}")
    if options.other_seed == options.seed:
        raise ValueError(f"--other-seed must not be --seed, got {options.seed} for both")
    if f"--{options.option}" in (word.split("=")[0].replace("_", "-") for word in training):
        raise ValueError(f"--{options.option} is what differs; give it by --values")


def variants(options: Options) -> dict[str, list[str]]:
    """Names of the runs, and the arguments in which they differ."""
    option, seed = f"--{options.option}", f"--seed={options.seed}"
    runs = {value: [option, value, seed] for value in options.values}
    if options.other_seed is not None:
        first = options.values[0]
        runs[f"{first}, another seed"] = [option, first, f"--seed={options.other_seed}"]
    return runs


def train(options: Options, label: str, changes: list[str], training: list[str]) -> dict[str, Any]:
    """Losses of a run, by `gptfast train` in a process of its own.

    Raises:
        RunError: it failed.
    """
    with tempfile.TemporaryDirectory(prefix="learning-") as parent:
        run = Path(parent, "run")
        arguments = ["train", options.recipe, "--device", options.device, *training, *changes]
        command = [sys.executable, "-m", "gptfast", *arguments, "--data", _absolute(options.data), "--out", str(run)]
        _, seconds = run_process(label, command, ROOT, options.threads)
        if not (run / "summary.json").is_file():
            raise RunError(f"{label}: the run wrote no summary.json")
        log, summary = read_log(run), read_json(run / "summary.json")
    return {
        "label": label,
        "command": shlex.join(["gptfast", *arguments, "--data", Path(options.data).name, "--out", "RUN"]),
        "backend": summary["backend"],
        "seconds": seconds,
        "losses": [{name: entry[name] for name in ("step", "loss")} for entry in log if "loss" in entry],
        "evaluations": [
            {name: entry[name] for name in ("step", "train_loss", "val_loss")} for entry in log if "val_loss" in entry
        ],
    }


def _absolute(data: str) -> str:
    """The processes run elsewhere; the name of a text that comes with the package stays one."""
    return str(Path(data).resolve()) if Path(data).exists() else data


def passage(content: dict[str, Any]) -> str:
    """What a document shows of a file of results: a table, the command, and on what it was measured."""
    first = content["runs"][0]
    lines = []
    for run in content["runs"]:
        apart = learning.differences(run, first)
        last = run["evaluations"][-1]
        largest = max((abs(difference) for _, difference in apart), default=0.0)
        columns = (run["label"], f"{last['train_loss']:.4f}", f"{last['val_loss']:.4f}")
        lines.append(
            (*columns, "" if run is first else f"{apart[-1][1]:+.4f}", "" if run is first else f"{largest:.4f}")
        )
    head = (
        content["option"],
        "training loss",
        "validation loss",
        f"above {first['label']}",
        "farthest apart",
    )
    measured_on = content["machine_info"]["gptfast"]
    return (
        f"{grid(head, lines)}\n\n`{first['command']}`, {first['evaluations'][-1]['step']:,} steps; "
        f"{measured_on['device']}, gptfast {measured_on['gptfast']}, PyTorch {measured_on['torch']}; measured "
        f"{content['datetime'][:10]} at commit {content['commit_info']['id'][:10]}.\n"
    )


if __name__ == "__main__":
    main()
