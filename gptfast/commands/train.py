"""The command `gptfast train`: run the trainer, then print a summary and the next command."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast.distributed import World
from gptfast.training import trainer
from gptfast.training.config import TrainConfig
from gptfast.training.progress import percent


@dataclass
class TrainOptions(TrainConfig):
    """Train a GPT on text and write a run folder.

    Options override the file given with --config, which overrides the preset.
    """

    config: str | None = None
    """File of settings: TOML, or JSON such as a run's config.json."""
    print_config: bool = False
    """Print the settings as JSON, in the format that --config reads, and exit."""

    @property
    def settings(self) -> TrainConfig:
        """Settings of the run, without the options of the command."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(TrainConfig)})


def run(options: TrainOptions, name: str, preset: TrainConfig) -> None:
    """Train, or print the settings. Exit with status 130 if a signal interrupted the run.

    Args:
        options: settings of the run.
        name: preset or run folder on the command line.
        preset: settings that the first line of output compares with.
    """
    config = options.settings
    if options.print_config:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    summary = trainer.train(config, Path(name).name, describe_changes(name, config, preset))
    if World.from_environment().is_main:
        print(describe(summary))
        prompt = f" --prompt {shlex.quote(config.sample_prompt)}" if config.sample_prompt else ""
        resume = f"interrupted; to continue: gptfast train {summary['run']}"
        print(resume if summary["interrupted"] else f"gptfast generate {summary['run']}{prompt}")
    if summary["interrupted"]:
        sys.exit(130)


def describe_changes(name: str, config: TrainConfig, preset: TrainConfig) -> str:
    """List the settings that differ from a preset."""
    settings, defaults = ({**vars(c), **vars(c.model)} for c in (config, preset))
    changed = [f"{key}={value!r}" for key, value in settings.items() if key != "model" and value != defaults[key]]
    return f"{name} with {', '.join(changed)}" if changed else f"{name} as it is"


def describe(summary: dict[str, Any]) -> str:
    """Format a summary of `trainer.train` in two lines."""
    loss, bits, speed = summary["val_loss"], summary.get("val_bits_per_byte"), summary["tokens_per_second"]
    if loss is None:
        losses = "no evaluation yet"
    else:
        losses = f"loss {loss:.4f}" + ("" if bits is None else f" ({bits:.4f} bits per byte)")
        if summary["validation_text"] == "training":
            losses += " on the training text, nothing being held out,"
        else:
            losses = f"validation {losses}, train loss {summary['train_loss']:.4f}"
    return (
        f"{losses} after {summary['steps']} steps in {summary['seconds']:.0f} s\n"
        f"{'no' if speed is None else format(speed, ',.0f')} tokens/s, MFU {percent(summary['mfu'])} "
        f"on {summary['device']}, backend {json.dumps(summary['backend'])}"
    )
