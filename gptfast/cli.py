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
from collections.abc import Sequence
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

USAGE = f"""usage: gptfast prepare SOURCE [options]    tokenize a large text once, for any number of runs
       gptfast train PRESET [options]      train a GPT and write a run folder
       gptfast train RUN [options]         resume a run from its last checkpoint
       gptfast generate MODEL [options]    continue prompts with a trained model
       gptfast eval MODEL [options]        measure perplexity on a text, or accuracy on multiple-choice questions
       gptfast export RUN FOLDER           write a run's model and tokenizer in the layout of Hugging Face transformers
       gptfast doctor                      show what is installed, which kernels run where, and what is broken

presets: {", ".join(recipes.names())}
`gptfast train PRESET --help` and `gptfast COMMAND --help` list the options."""

# without `train`, whose defaults depend on its first argument
COMMANDS: dict[str, tuple[type, Any]] = {
    "prepare": (prepare.PrepareConfig, prepare.run),
    "generate": (generate.GenerateConfig, generate.write),
    "eval": (evaluate.EvalConfig, evaluate.run),
    "export": (export.ExportConfig, export.run),
    "doctor": (doctor.DoctorConfig, doctor.run),
}
Config = TypeVar("Config")
_RANK_0_SECONDS = 20.0  # head start of rank 0 in reporting an error of all ranks


def program() -> NoReturn:
    """Run the command line and exit the process."""
    status: Any = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    distributed.exit_process(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. An error prints one line and exits with status 2 if the arguments are wrong, else 1."""
    command, *options = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        if command in ("-h", "--help") or (command == "train" and options[:1] in ([], ["-h"], ["--help"])):
            print(USAGE)
        elif command == "train":
            _train(options[0], options[1:])
        elif command in COMMANDS:
            config, run = COMMANDS[command]
            run(_parse(config, options, f"gptfast {command}"))
        else:
            raise ValueError(f"unknown command {command!r}; accepted: train, {', '.join(COMMANDS)}")
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
        # every rank rejects wrong arguments; torchrun ends the others as soon as rank 0 exits
        time.sleep(_RANK_0_SECONDS)
    print("gptfast:", *(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(status)


def _train(name: str, options: list[str]) -> None:
    file = _last_value(options, "--config", "")
    settings = _as_options(_read_settings(Path(file))) if file else []
    if run_folder.is_run(Path(name)):
        preset = TrainConfig()
        settings = [*_as_options(read_json(Path(name, "config.json"))), *settings, "--out", name, "--resume"]
    else:
        preset = recipes.recipe(name, devices.resolve(_last_value([*settings, *options], "--device", "auto")))
    options = [*settings, *options]
    if any(option.split("=")[0] in ("--vocab-size", "--vocab_size") for option in options):
        raise ValueError("--vocab-size cannot be set: the tokenizer determines it")
    default = train.TrainOptions(**vars(preset))
    train.run(_parse(train.TrainOptions, options, f"gptfast train {name}", default), name, preset)


def _read_settings(path: Path) -> dict[str, Any]:
    """Read a settings file: TOML if its name ends in .toml, else JSON."""
    if not path.is_file():
        raise ValueError(f"no such file with settings: {path}")
    if path.suffix != ".toml":
        return read_json(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _as_options(settings: dict[str, Any]) -> list[str]:
    """Convert settings to options, so that one parser checks both."""
    options: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, dict):
            # the size of a run's vocabulary follows from its tokenizer
            options += _as_options({key: v for key, v in value.items() if (name, key) != ("model", "vocab_size")})
        elif isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            options += [f"--{flag}", *map(str, value)]
        else:
            options += [f"--{flag}", str(value)]
    return options


def _last_value(options: list[str], flag: str, default: str) -> str:
    """Return the value of an option that is needed before parsing. The last one given counts, as for tyro."""
    value = default
    for option, following in itertools.pairwise([*options, default]):
        if option == flag:
            value = following
        elif option.startswith(flag + "="):
            value = option.partition("=")[2]
    return value


def _parse(config: type[Config], options: list[str], program: str, default: Config | None = None) -> Config:
    """Parse options into a config. Raise ValueError with one line where tyro prints a box."""
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
        raise ValueError(re.sub(r"^Error parsing \w+: ", "", message)) from None
