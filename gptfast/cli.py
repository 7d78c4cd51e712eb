"""The command line: `gptfast prepare`, `gptfast train` and `gptfast generate`."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import tyro

from gptfast import devices, recipes, run, trainer
from gptfast import prepare as preparation

USAGE = f"""usage: gptfast prepare SOURCE [options]    tokenize texts, for data too large to tokenize at every start
       gptfast train PRESET [options]      train a GPT and write a run folder
       gptfast generate RUN [options]      continue a prompt with a trained model

presets: {", ".join(recipes.names())}
`gptfast train PRESET --help` and the like list the options."""

Settings = TypeVar("Settings")


@dataclass
class GenerateConfig:
    """Continue a prompt with a trained model."""

    run: tyro.conf.Positional[str]
    """Run folder of the model."""
    prompt: str = "\n"
    """Text to continue."""
    max_new_tokens: int = 500
    """Tokens to add."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens only."""
    num_samples: int = 1
    """How many continuations to write."""
    seed: int = 1337
    """Seed of the sampling."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, eager, or choices by operator such as attention=triton,ffn=eager."""


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
    else:
        raise ValueError(f"unknown command {arguments[0]!r}; accepted: prepare, train, generate")


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
    default = recipes.recipe(name, devices.resolve(_option(options, "--device", "auto")))
    config = _parse(trainer.TrainConfig, options, f"gptfast train {name}", default)
    summary = trainer.train(config, name)
    print(trainer.describe(summary))
    print(f"gptfast generate {summary['run']}")
    if summary["interrupted"]:
        sys.exit(130)


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
    config = _parse(GenerateConfig, arguments, "gptfast generate")
    if config.num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {config.num_samples}")
    if not 0 <= config.seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {config.seed}")
    if not config.prompt:
        raise ValueError("the prompt is empty; give at least one character")
    device = devices.resolve(config.device)
    model, tokenizer = run.load(Path(config.run), device, config.backend)
    prompt = torch.from_numpy(tokenizer.encode(config.prompt))[None].to(device)  # [1, T]
    generator = torch.Generator(device).manual_seed(config.seed)
    for _ in range(config.num_samples):
        tokens = model.generate(prompt, config.max_new_tokens, config.temperature, config.top_k, generator)
        print(tokenizer.decode(tokens[0].tolist()))


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
    print("gptfast:", *(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(status)
