"""Effect of one option on learning curves: `python -m benchmarks.vs_nanogpt.learning_curves RECIPE --option backend`.

Trains a recipe once for each value of one option, with the same weights and batches otherwise, and compares the losses
with those of the first value. A run of the first value with another seed shows the effect of chance. The results are
FOLDER/<device>/learning-<recipe>-<option>.json, which `benchmarks.report` accepts beside its own files, and a picture
of the same name.
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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.measuring import machine
from benchmarks.measuring.processes import RunError, exit_on_error, run_process
from benchmarks.reporting import plotting
from benchmarks.reporting.markdown import grid
from gptfast import devices
from gptfast.checkpoint.atomic_files import read_json
from gptfast.checkpoint.run_folder import read_log
from gptfast.training import recipes

ROOT = Path(__file__).parents[2]
_OURS = ("data", "out", "device", "seed")  # options of `gptfast train` that this command passes itself
_LINES = (("eager", "-", 3.0), ("main", "-", 1.2), ("series-2", "--", 1.2), ("series-1", ":", 1.6))


@dataclass
class LearningCurveOptions:
    """Train a recipe with several values of one option and compare the losses.

    Unknown options go to `gptfast train`, for all runs.
    """

    recipe: tyro.conf.Positional[str]
    """A preset of `gptfast train`."""
    data: str
    """Like --data of `gptfast train`."""
    out: str
    """Folder of results; the command writes to OUT/<device>/."""
    option: str = "backend"
    """Option of `gptfast train` that differs, such as backend, dtype or optimizer."""
    values: tuple[str, ...] = ("eager", "triton")
    """Values of the option; the others are compared with the first."""
    other_seed: int | None = None
    """Train once more with the first value and this seed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: int = 1337
    """Seed of weights, batches and dropout."""
    threads: int | None = None
    """Threads of the runs; PyTorch's default if not given."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and compare; exit status 2 for arguments that cannot be trained, 1 if a run fails."""
    module = "benchmarks.vs_nanogpt.learning_curves"
    options, training = tyro.cli(
        LearningCurveOptions, prog=f"python -m {module}", args=arguments, return_unknown_args=True
    )
    with exit_on_error(module):
        compare(options, training)


def compare(options: LearningCurveOptions, training: list[str]) -> None:
    """Train all runs, write results and picture, and print a table.

    Args:
        options: options of this command.
        training: further options, of `gptfast train`.

    Raises:
        ValueError: an option is not accepted.
        RunError: a run failed.
        OSError: the results cannot be written.
    """
    _check(options, training)
    device = devices.resolve(options.device)
    path = Path(options.out, machine.slug(device), f"learning-{options.recipe}-{options.option}.json")
    path.parent.mkdir(parents=True, exist_ok=True)  # fails before hours of training, not after
    content = machine.result_head(device) | {"recipe": options.recipe, "option": options.option, "runs": []}
    variants = [(value, value, options.seed) for value in options.values]
    if options.other_seed is not None:
        variants.append((f"{options.values[0]}, another seed", options.values[0], options.other_seed))
    for label, value, seed in variants:
        print(f"training with {options.option} {label}", flush=True)
        changes = [*training, f"--{options.option}", value, f"--seed={seed}"]
        content["runs"].append(train(options, label, changes))
    machine.save_results(path, content)
    draw(content, path.with_suffix(".png"))
    print(f"\n{passage(content)}\n{path}\n{path.with_suffix('.png')}")


def _check(options: LearningCurveOptions, training: list[str]) -> None:
    if options.recipe not in recipes.names():
        raise ValueError(f"unknown recipe {options.recipe!r}; accepted: {', '.join(recipes.names())}")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", options.option) or options.option in _OURS:
        raise ValueError(
            f"--option is {options.option!r}; accepted: an option of `gptfast train` without its dashes, except "
            f"{', '.join(_OURS)}"
        )
    if not options.values or len(set(options.values)) < len(options.values):
        raise ValueError(f"--values must be different values, got {' '.join(options.values) or 'none'}")
    if options.other_seed == options.seed:
        raise ValueError(f"--other-seed must not be --seed, got {options.seed} for both")
    if f"--{options.option}" in (word.split("=")[0].replace("_", "-") for word in training):
        raise ValueError(f"--{options.option} is the option that differs; pass its values with --values")


def train(options: LearningCurveOptions, label: str, changes: list[str]) -> dict[str, Any]:
    """Train with `gptfast train` in its own process and return the losses.

    Raises:
        RunError: the run failed.
    """
    arguments = ["train", options.recipe, "--device", options.device, *changes]
    # the process runs in another folder; the name of a text that comes with the package stays one
    data = str(Path(options.data).resolve()) if Path(options.data).exists() else options.data
    with tempfile.TemporaryDirectory(prefix="learning-") as parent:
        run = Path(parent, "run")
        command = [sys.executable, "-m", "gptfast", *arguments, "--data", data, "--out", str(run)]
        _, seconds = run_process(label, command, ROOT, options.threads)
        if not (run / "summary.json").is_file():
            raise RunError(f"{label}: the run wrote no summary.json")
        log, summary = read_log(run), read_json(run / "summary.json")

    def entries(*names: str) -> list[dict[str, Any]]:
        return [{name: entry[name] for name in ("step", *names)} for entry in log if names[0] in entry]

    return {
        "label": label,
        "command": shlex.join(["gptfast", *arguments, "--data", Path(options.data).name, "--out", "RUN"]),
        "backend": summary["backend"],
        "seconds": seconds,
        "losses": entries("loss"),
        "evaluations": entries("val_loss", "train_loss"),
    }


def differences(run: dict[str, Any], first: dict[str, Any]) -> list[tuple[int, float]]:
    """Step, and a run's validation loss minus the first run's, at the evaluations that both have."""
    theirs = {entry["step"]: entry["val_loss"] for entry in first["evaluations"]}
    ours = {entry["step"]: entry["val_loss"] for entry in run["evaluations"]}
    return [(step, loss - theirs[step]) for step, loss in ours.items() if step in theirs]


def draw(content: dict[str, Any], path: Path) -> None:
    """Write a PNG of the validation losses, with the differences to the first run below."""
    first = content["runs"][0]
    with plotting.style():
        figure = Figure(figsize=(plotting.WIDTH, 5.6), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for number, run in enumerate(content["runs"]):
            name, line, width = _LINES[number % len(_LINES)]
            look: dict[str, Any] = {"color": plotting.color(name), "linestyle": line, "linewidth": width}
            losses = [(entry["step"], entry["val_loss"]) for entry in run["evaluations"]]
            above.plot(*zip(*losses, strict=True), label=run["label"], **look)
            if run is not first:
                below.plot(*zip(*differences(run, first), strict=True), marker=".", **look)
        below.axhline(0.0, color=plotting.color("eager"), linewidth=3.0, zorder=1.6)  # above the grid
        above.set(ylabel="validation loss (nats per token)", title=f"{content['recipe']} by {content['option']}")
        below.set(xlabel="step", ylabel=f"above {first['label']}")
        below.yaxis.set_major_formatter("{x:+.3f}")
        below.xaxis.set_major_locator(MaxNLocator(integer=True))
        below.xaxis.set_major_formatter("{x:,.0f}")
        above.grid()
        below.grid()
        above.legend()
        figure.savefig(path, format="png", dpi=130)


def passage(content: dict[str, Any]) -> str:
    """Format results for a document: a table, the command, and the machine."""
    first = content["runs"][0]
    lines = []
    for run in content["runs"]:
        last, above = run["evaluations"][-1], [difference for _, difference in differences(run, first)]
        compared = ("", "") if run is first else (f"{above[-1]:+.4f}", f"{max(map(abs, above)):.4f}")
        lines.append((run["label"], f"{last['train_loss']:.4f}", f"{last['val_loss']:.4f}", *compared))
    columns = (content["option"], "training loss", "validation loss", f"above {first['label']}", "farthest apart")
    measured_on = content["machine_info"]["gptfast"]
    return (
        f"{grid(columns, lines)}\n\n`{first['command']}`, {first['evaluations'][-1]['step']:,} steps; "
        f"{measured_on['device']}, gptfast {measured_on['gptfast']}, PyTorch {measured_on['torch']}; measured "
        f"{content['datetime'][:10]} at commit {content['commit_info']['id'][:10]}.\n"
    )


if __name__ == "__main__":
    main()
