"""The command line: `gptfast prepare`, `train`, `generate`, `eval`, `export` and `doctor`."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import tyro

from gptfast import devices, distributed
from gptfast.checkpoint import run_folder
from gptfast.checkpoint.atomic_files import read_json
from gptfast.commands import doctor, export, generate, prepare, train
from gptfast.commands import eval as evaluate
from gptfast.training import recipes
from gptfast.training.config import TrainConfig

USAGE = f"""usage: gptfast prepare SOURCE [options]    tokenize texts once, if that takes too long at every start
       gptfast train PRESET [options]      train a GPT and write a run folder
       gptfast train RUN [options]         continue a run from its last checkpoint
       gptfast generate MODEL [options]    continue prompts with a trained model
       gptfast eval MODEL [options]        measure perplexity on a text, or accuracy on multiple-choice questions
       gptfast export RUN FOLDER           write a run's model and tokenizer for Hugging Face's transformers
       gptfast doctor                      show what is installed, which kernels run where, and what is broken

presets: {", ".join(recipes.names())}
`gptfast train PRESET --help` and `gptfast COMMAND --help` list the options."""

# `train` is missing: its defaults depend on its first argument
COMMANDS: dict[str, tuple[type, Any]] = {
    "prepare": (prepare.PrepareConfig, prepare.run),
    "generate": (generate.GenerateConfig, generate.write),
    "eval": (evaluate.EvalConfig, evaluate.run),
    "export": (export.ExportConfig, export.run),
    "doctor": (doctor.DoctorConfig, doctor.run),
}
Config = TypeVar("Config")
_RANK_0_SECONDS = 20.0  # that other ranks give rank 0 to report the same error


def program() -> NoReturn:
    """Run the command line and end the process."""
    status: Any = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    distributed.exit_process(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Errors end it in one line, with status 2 if the arguments are wrong and 1 otherwise."""
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with exit_on_error():
        if command in ("-h", "--help") or (command == "train" and options[:1] in ([], ["-h"], ["--help"])):
            print(USAGE)
        elif command == "train":
            _train(options[0], options[1:])
        elif command in COMMANDS:
            config, run = COMMANDS[command]
            run(parse(config, options, f"gptfast {command}"))
        else:
            accepted = "prepare, train, generate, eval, export, doctor"
            raise ValueError(f"unknown command {command!r}; accepted: {accepted}")


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn errors into a line on standard error and an exit status."""
    try:
        yield
    except KeyboardInterrupt:
        _exit(130, "interrupted")
    except ValueError as error:
        _exit(2, str(error))
    except (MemoryError, RuntimeError) as error:
        message = str(error).rpartition("DefaultCPUAllocator: ")[2]
        # on a CPU PyTorch raises a plain RuntimeError
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in message
        _exit(1, f"out of memory, a smaller model or batch may fit: {message}" if full else message)
    except OSError as error:
        _exit(1, str(error))


def _exit(status: int, message: str) -> NoReturn:
    if status == 2 and os.environ.get("RANK", "0") != "0":
        # every rank finds wrong arguments; torchrun ends the others as soon as rank 0 has reported them
        time.sleep(_RANK_0_SECONDS)
    print("gptfast:", *(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(status)


def _train(name: str, options: list[str]) -> None:
    if any(option.split("=")[0] in ("--vocab-size", "--vocab_size") for option in options):
        raise ValueError("--vocab-size cannot be set: the tokenizer determines it")
    if run_folder.is_run(Path(name)):
        preset = TrainConfig()
        options = [*as_options(read_settings(Path(name, "config.json"))), "--out", name, "--resume", *options]
    else:
        preset = recipes.recipe(name, devices.resolve(_last_value(options, "--device", "auto")))
    if file := _last_value(options, "--config", ""):
        options = [*as_options(read_settings(Path(file))), *options]
    default = train.TrainOptions(**vars(preset))
    train.run(parse(train.TrainOptions, options, f"gptfast train {name}", default), name, preset)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file: TOML if its name ends so, else JSON.

    Raises:
        ValueError: the file is missing or cannot be parsed.
    """
    if not path.is_file():
        raise ValueError(f"no such file with settings: {path}")
    if path.suffix != ".toml":
        return read_json(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def as_options(settings: dict[str, Any]) -> list[str]:
    """Turn settings into options, so that one parser checks both."""
    options: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, dict):
            # the tokenizer determines the vocabulary size again
            options += as_options({key: v for key, v in value.items() if (name, key) != ("model", "vocab_size")})
        elif isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            options += [f"--{flag}", *map(str, value)]
        else:
            options += [f"--{flag}", str(value)]
    return options


def _last_value(options: list[str], flag: str, default: str) -> str:
    """Value of an option that is needed before parsing: the last one given, as tyro takes it."""
    value = default
    for option, following in itertools.pairwise([*options, default]):
        if option == flag:
            value = following
        elif option.startswith(flag + "="):
            value = option.partition("=")[2]
    return value


def parse(config: type[Config], options: list[str], program: str, default: Config | None = None) -> Config:
    """Parse options into a config; raise ValueError with one line where tyro would print a box of text."""
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(config, args=options, prog=program, config=(tyro.conf.OmitArgPrefixes,), **defaults)
    except SystemExit as ended:
        if not ended.code:  # --help
            raise
        # rules separate title, message and hints: dashes, or box-drawing characters around the title
        parts = re.split(r"^(?:╭.*|[\s│]*[-─]{5,}[\s│]*)$", printed.getvalue(), flags=re.MULTILINE)
        message = " ".join((parts[1] if len(parts) > 1 else parts[0]).replace("│", " ").split())
        raise ValueError(
            re.sub(r"^Error parsing \w+: ", "", message) or f"unknown options; see {program} --help"
        ) from None
