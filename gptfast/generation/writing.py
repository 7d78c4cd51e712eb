"""The command `gptfast generate`: prompts from options, a file, standard input or a terminal, and what follows them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from gptfast import devices, run, tokenizers
from gptfast.generation import texts
from gptfast.generation.sampling import Sampling
from gptfast.generation.texts import Text
from gptfast.model import GPT
from gptfast.pretrained import from_pretrained
from gptfast.tokenizers import Tokenizer

_TOGETHER = 64  # continuations that are written at a time


@dataclass
class GenerateConfig:
    """Continue prompts with a trained model."""

    model: tyro.conf.Positional[str]
    """Run folder, folder in Hugging Face's layout, or gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    prompt: str = "\n"
    """Text to continue."""
    prompt_file: str | None = None
    """File with a prompt on each line, in the place of --prompt; - is standard input."""
    interactive: bool = False
    """Ask for prompts at the terminal, with the arrow keys for those before."""
    stream: bool = False
    """Write each piece of text as soon as it is there."""
    json: bool = False
    """Write a JSON object for each continuation, with its tokens and their log-probabilities."""
    max_new_tokens: int = 500
    """Tokens to add."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings before which a continuation ends."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: Sampling(temperature=0.8))
    seed: int = 1337
    """Seed of the sampling."""
    tokenizer: str = "gpt2"
    """Of a model in Hugging Face's layout, which does not bring its own: an encoding of tiktoken."""
    vocabulary: str | None = None
    """Folder with the files of that encoding, for machines without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, eager, or choices by operator such as attention=triton,ffn=eager."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if self.interactive and (self.prompt_file is not None or self.json):
            raise ValueError("--interactive asks for prompts and writes text; it excludes --prompt-file and --json")
        if self.json and self.stream:
            raise ValueError("--json writes whole continuations; it excludes --stream")
        if not self.prompt and self.prompt_file is None and not self.interactive:
            raise ValueError("the prompt is empty; give at least one character")


def write(config: GenerateConfig) -> None:
    """Do what the settings say. Speed goes to standard error, where that is a terminal.

    Raises:
        ValueError: a setting, model or prompt that is wrong.
    """
    device = devices.resolve(config.device)
    model, tokenizer = load(config, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    prompts = _asked() if config.interactive else _prompts(config)
    for batch in _batches(prompts, 1 if config.interactive else max(1, _TOGETHER // config.num_samples)):
        found = [Text(prompt) for prompt in batch for _ in range(config.num_samples)]
        # pieces of several texts at once would be mixed
        one_by_one = config.stream or config.interactive
        for group in [[text] for text in found] if one_by_one else [found]:
            _write(config, model, tokenizer, group, generator, one_by_one)


def load(config: GenerateConfig, device: torch.device) -> tuple[GPT, Tokenizer]:
    """The model on the device, and its tokenizer.

    Raises:
        ValueError: there is none, it is damaged, or the tokenizer is of another vocabulary.
    """
    path = Path(config.model).expanduser()
    if (path / "tokenizer.json").is_file() or not ((path / "config.json").is_file() or not path.exists()):
        return run.load(path, device, config.backend)
    model = from_pretrained(str(path) if path.is_dir() else config.model, backend="eager")
    tokenizer = tokenizers.for_documents(config.tokenizer, [], vocabulary=config.vocabulary)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{config.model} has a vocabulary of {model.config.vocab_size} tokens, {config.tokenizer!r} one of "
            f"{tokenizer.vocab_size}; give the model's own with --tokenizer"
        )
    model.to(device).set_backend(config.backend)
    return model, tokenizer


def _prompts(config: GenerateConfig) -> Iterator[str]:
    if config.prompt_file is None:
        yield config.prompt
    elif config.prompt_file == "-":
        yield from (line.rstrip("\n") for line in sys.stdin)
    else:
        path = Path(config.prompt_file)
        if not path.is_file():
            raise ValueError(f"no such file with prompts: {path}")
        with open(path, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)


def _asked() -> Iterator[str]:
    """What a person types, line by line, until the end of input; earlier lines come back with the arrow keys."""
    history = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast", "prompts")
    try:
        import readline
    except ImportError:  # Windows edits lines itself
        readline = None  # type: ignore[assignment]
    if readline is not None and history.is_file():
        readline.read_history_file(history)
    try:
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            if line:
                yield line
    finally:
        if readline is not None:
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(history)


def _batches(prompts: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for prompt in prompts:
        batch.append(prompt)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(
    config: GenerateConfig,
    model: GPT,
    tokenizer: Tokenizer,
    found: list[Text],
    generator: torch.Generator,
    piecewise: bool,
) -> None:
    started, first = time.perf_counter(), None
    if piecewise:
        print(found[0].prompt, end="", flush=True)
    for _, piece in texts.stream(
        model, tokenizer, found, config.max_new_tokens, config.sampling, config.stop, generator
    ):
        first = first or time.perf_counter() - started
        if piecewise:
            print(piece, end="", flush=True)
    if piecewise:
        print(flush=True)
    elif config.json:
        for text in found:
            print(json.dumps(vars(text), ensure_ascii=False), flush=True)
    else:
        for text in found:
            print(text.prompt + text.text, flush=True)
    if sys.stderr.isatty():
        seconds, tokens = time.perf_counter() - started, sum(len(text.tokens) for text in found)
        begun = "" if first is None else f", the first text after {first:.2f} s"
        print(f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s{begun}", file=sys.stderr)
