"""The command line: `gptfast prepare`, `train`, `generate`, `eval`, `export` and `doctor`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import tyro

from gptfast import devices, distributed
from gptfast.checkpoint import run_folder
from gptfast.checkpoint.atomic_files import read_json
from gptfast.commands import doctor, generate
from gptfast.commands import eval as evaluation
from gptfast.data import prepare as preparation
from gptfast.distributed import World
from gptfast.huggingface import save
from gptfast.training import recipes, trainer
from gptfast.training.config import TrainConfig

USAGE = f"""usage: gptfast prepare SOURCE [options]    tokenize texts, for data too large to tokenize at every start
       gptfast train PRESET [options]      train a GPT and write a run folder
       gptfast train RUN [options]         continue a run from its last checkpoint
       gptfast generate MODEL [options]    continue prompts with a trained model
       gptfast eval MODEL [options]        measure how well a model predicts a text or chooses endings
       gptfast export RUN FOLDER           write a run's model and tokenizer for Hugging Face's transformers
       gptfast doctor                      show what is installed, what runs where and why, and what is broken

presets: {", ".join(recipes.names())}
`gptfast train PRESET --help` and the like list the options."""

Settings = TypeVar("Settings")
_SECONDS_FOR_THE_FIRST = 20.0  # of several processes, to come as far as another has


@dataclass
class TrainOptions(TrainConfig):
    """Train a GPT on text and write a run folder.

    Settings are the preset's, then those of --config, then the options.
    """

    config: str | None = None
    """File with settings, JSON as in a run's config.json or TOML."""
    print_config: bool = False
    """Print the settings as JSON, which --config takes, and end."""


def program() -> NoReturn:
    """Run the command line and end the process."""
    status: Any = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    distributed.leave(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what can go wrong ends in one line, with exit status 2 where the arguments are to blame."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except ValueError as error:
        _exit(2, str(error))
    except (MemoryError, RuntimeError) as error:
        message = str(error).rpartition("DefaultCPUAllocator: ")[2]
        # PyTorch has an error of its own for the memory of GPUs alone
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in message
        _exit(1, f"out of memory, a smaller model or batch may fit: {message}" if full else message)
    except OSError as error:
        _exit(1, str(error))


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
    elif arguments[0] == "prepare":
        _prepare(arguments[1:])
    elif arguments[0] == "train":
        _train(arguments[1:])
    elif arguments[0] == "generate":
        _generate(arguments[1:])
    elif arguments[0] == "eval":
        evaluation.write(_parse(evaluation.EvalConfig, arguments[1:], "gptfast eval"))
    elif arguments[0] == "export":
        _export(arguments[1:])
    elif arguments[0] == "doctor":
        _doctor(arguments[1:])
    else:
        raise ValueError(f"unknown command {arguments[0]!r}; accepted: prepare, train, generate, eval, export, doctor")


def _prepare(arguments: list[str]) -> None:
    config = _parse(preparation.PrepareConfig, arguments, "gptfast prepare")
    index = preparation.prepare(config)
    print(preparation.describe(index, config.out))
    print(f"gptfast train PRESET --data {config.out}")


def _train(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    name, options = arguments[0], arguments[1:]
    if any(option.split("=")[0] in ("--vocab-size", "--vocab_size") for option in options):
        raise ValueError("--vocab-size cannot be set: the tokenizer determines it")
    if run_folder.is_run(Path(name)):
        preset = TrainConfig()
        options = [*_as_options(read_settings(Path(name, "config.json"))), "--out", name, "--resume", *options]
    else:
        preset = recipes.recipe(name, devices.resolve(_option(options, "--device", "auto")))
    file = _option(options, "--config", "")
    if file:
        options = [*_as_options(read_settings(Path(file))), *options]
    chosen = vars(_parse(TrainOptions, options, f"gptfast train {name}", TrainOptions(**vars(preset))))
    config = TrainConfig(**{field.name: chosen[field.name] for field in dataclasses.fields(TrainConfig)})
    if chosen["print_config"]:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    summary = trainer.train(config, Path(name).name, describe_settings(name, config, preset))
    if World.of_environment().first:
        print(trainer.describe(summary))
        again, prompt = f"gptfast train {summary['run']}", config.sample_prompt
        sample = f"gptfast generate {summary['run']}" + (f" --prompt {shlex.quote(prompt)}" if prompt else "")
        print(f"interrupted; to continue: {again}" if summary["interrupted"] else sample)
    if summary["interrupted"]:
        sys.exit(130)


def describe_settings(name: str, config: TrainConfig, preset: TrainConfig) -> str:
    """What differs from a preset, in a line."""
    given, usual = ({**vars(c), **vars(c.model)} for c in (config, preset))
    changed = [f"{key}={value!r}" for key, value in given.items() if key != "model" and value != usual[key]]
    return f"{name} with {', '.join(changed)}" if changed else f"{name} as it is"


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file: JSON, or TOML by its ending.

    Raises:
        ValueError: the file is missing, or none of these.
    """
    if not path.is_file():
        raise ValueError(f"no such file with settings: {path}")
    if path.suffix != ".toml":
        return read_json(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _as_options(settings: dict[str, Any]) -> list[str]:
    """Settings as the options that give them: one parser checks both."""
    options: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, dict):
            # the tokenizer determines it anew
            options += _as_options({key: v for key, v in value.items() if (name, key) != ("model", "vocab_size")})
        elif isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            options += [f"--{flag}", *map(str, value)]
        else:
            options += [f"--{flag}", str(value)]
    return options


def _option(options: list[str], flag: str, default: str) -> str:
    """The value of an option that has to be known before the others are parsed: the last one, as tyro takes it."""
    value = default
    for option, following in zip(options, [*options[1:], default], strict=False):
        if option == flag:
            value = following
        elif option.startswith(flag + "="):
            value = option.partition("=")[2]
    return value


def _generate(arguments: list[str]) -> None:
    generate.write(_parse(generate.GenerateConfig, arguments, "gptfast generate"))


def _export(arguments: list[str]) -> None:
    config = _parse(save.ExportConfig, arguments, "gptfast export")
    print(save.export(config))


def _doctor(arguments: list[str]) -> None:
    _parse(doctor.DoctorConfig, arguments, "gptfast doctor")
    report = doctor.examine()
    print(report)
    for problem in report.problems:
        print(f"gptfast: {problem}", file=sys.stderr)
    if report.problems:
        sys.exit(1)


def _parse(settings: type[Settings], options: list[str], program: str, default: Settings | None = None) -> Settings:
    """The settings that `options` describe. Raises ValueError with one line where tyro would print a box of text."""
    start: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(settings, args=options, prog=program, config=(tyro.conf.OmitArgPrefixes,), **start)
    except SystemExit as ended:
        if not ended.code:  # --help
            raise
        # title, message and hints are separated by rules: of dashes, or box-drawing characters with the title inside
        parts = re.split(r"^(?:╭.*|[\s│]*[-─]{5,}[\s│]*)$", printed.getvalue(), flags=re.MULTILINE)
        message = " ".join((parts[1] if len(parts) > 1 else parts[0]).replace("│", " ").split())
        raise ValueError(
            re.sub(r"^Error parsing \w+: ", "", message) or f"unknown options; see {program} --help"
        ) from None


def _exit(status: int, message: str) -> NoReturn:
    if status == 2 and os.environ.get("RANK", "0") != "0":
        # what is wrong with arguments all processes of a run find: the first one says it, and torchrun ends the others
        time.sleep(_SECONDS_FOR_THE_FIRST)
    print("gptfast:", *(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(status)
