"""The command `gptfast generate`: prompts from options, a file, standard input or a terminal, and what follows them."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro

from gptfast import devices, load_model
from gptfast.generation import text as texts
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from gptfast.generation.text import Text
from gptfast.model import GPT
from gptfast.quantization import for_decoding, quantize
from gptfast.tokenizers import Tokenizer

_WRITING = Sampling(temperature=0.8)
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
    num_beams: int = 1
    """More than 1 searches for the likeliest continuations instead of drawing one."""
    length_penalty: float = 1.0
    """Of the search: above 0 is for long continuations, below 0 for short ones."""
    draft: str | None = None
    """A smaller model of the same tokenizer, which proposes tokens that the model checks several at a time."""
    draft_tokens: int = 4
    """Tokens it proposes at a time."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: _WRITING)
    seed: int = 1337
    """Seed of the sampling."""
    tokenizer: str = "gpt2"
    """Of a model in Hugging Face's layout that does not bring its own, unlike GPT-2 and what `gptfast export` writes:
    byte, or an encoding of tiktoken."""
    vocabulary: str | None = None
    """Folder with the files of that encoding, for machines without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    dtype: str = "auto"
    """Of the weights: auto (bfloat16 where the device multiplies in it), float32, float16, bfloat16 or int8."""
    compile: bool = False
    """Put each step through torch.compile, which takes a minute at the start."""

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
        if self.dtype not in (accepted := ("auto", *devices.DTYPES, "int8")):
            raise ValueError(f"unknown dtype {self.dtype!r}; accepted: {', '.join(accepted)}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.num_beams > 1:
            self._check_beams()
        if self.draft is not None and self.compile:
            raise ValueError("--draft reads several tokens at a time; it excludes --compile")
        if not self.prompt and self.prompt_file is None and not self.interactive:
            raise ValueError("the prompt is empty; give at least one character")

    def _check_beams(self) -> None:
        excluded = {"--stream": self.stream, "--stop": self.stop, "--draft": self.draft, "--compile": self.compile}
        given = [name for name, value in excluded.items() if value]
        if given:
            raise ValueError(f"--num-beams searches for whole continuations; it excludes {', '.join(given)}")
        if self.num_samples > self.num_beams:
            raise ValueError(f"num_samples must be at most num_beams={self.num_beams}, got {self.num_samples}")
        if self.sampling.temperature == _WRITING.temperature:  # nobody asked for it
            self.sampling = replace(self.sampling, temperature=0.0)


@dataclass
class _Writer:
    """All that continues prompts."""

    config: GenerateConfig
    model: GPT
    tokenizer: Tokenizer
    draft: Draft | None
    generator: torch.Generator


def write(config: GenerateConfig) -> None:
    """Do what the settings say. Speed goes to standard error, where that is a terminal.

    Raises:
        ValueError: a setting, model or prompt that is wrong.
    """
    device = devices.resolve(config.device)
    model, tokenizer = load(config, config.model, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    writer = _Writer(config, model, tokenizer, _load_draft(config, tokenizer, device), generator)
    prompts = _asked() if config.interactive else _prompts(config)
    # pieces of several texts at once would be mixed
    one_by_one = config.stream or config.interactive
    together = 1 if config.interactive else max(1, _TOGETHER // max(config.num_samples, config.num_beams))
    for batch in _batches(prompts, together):
        if config.num_beams > 1:
            _write(writer, batch, piecewise=False)
            continue
        found = [prompt for prompt in batch for _ in range(config.num_samples)]
        for group in [[prompt] for prompt in found] if one_by_one else [found]:
            _write(writer, group, one_by_one)


def _load_draft(config: GenerateConfig, tokenizer: Tokenizer, device: torch.device) -> Draft | None:
    if config.draft is None:
        return None
    model, its_tokenizer = load(config, config.draft, device)
    if its_tokenizer.to_json() != tokenizer.to_json():
        raise ValueError(f"--draft {config.draft} has another tokenizer than {config.model}; accepted: the same")
    return Draft(model, config.draft_tokens)


def load(config: GenerateConfig, name: str, device: torch.device) -> tuple[GPT, Tokenizer]:
    """A model on the device, in the dtype of the settings, and its tokenizer.

    Raises:
        ValueError: there is none, it is damaged, or the tokenizer is of another vocabulary.
    """
    dtype = None if config.dtype == "int8" else devices.resolve_dtype(config.dtype, device)
    model, tokenizer = load_model.load(name, device, config.tokenizer, config.vocabulary)
    model.to(device, dtype or devices.resolve_dtype("auto", device)).set_backend(config.backend)
    if dtype is None:
        return quantize(model), tokenizer
    # packed once, and not for every prompt; the compiler packs weights itself
    return model if config.compile else for_decoding(model.eval()), tokenizer


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


def _write(writer: _Writer, prompts: list[str], piecewise: bool) -> None:
    config = writer.config
    started = time.perf_counter()
    if config.num_beams > 1:
        found, first = _search(writer, prompts), None
    else:
        found, first = _stream(writer, prompts, piecewise)
    if config.json:
        for text in found:
            print(json.dumps(vars(text), ensure_ascii=False), flush=True)
    elif not piecewise:
        for text in found:
            print(text.prompt + text.text, flush=True)
    if sys.stderr.isatty():
        seconds, tokens = time.perf_counter() - started, sum(len(text.tokens) for text in found)
        said = [f"{tokens:,} tokens", f"{tokens / seconds:,.0f} tokens/s"]
        if first is not None:
            said.append(f"the first text after {first - started:.2f} s")
        if writer.draft is not None:
            said.append(f"{writer.draft.acceptance_rate:.0%} of the draft's tokens accepted")
        print(", ".join(said), file=sys.stderr)


def _search(writer: _Writer, prompts: list[str]) -> list[Text]:
    config = writer.config
    return texts.search(
        writer.model, writer.tokenizer, prompts, config.max_new_tokens, config.num_beams, config.length_penalty,
        config.sampling, config.num_samples,
    )  # fmt: skip


def _stream(writer: _Writer, prompts: list[str], piecewise: bool) -> tuple[list[Text], float | None]:
    """The texts, and when the first piece of them was there."""
    config, first = writer.config, None
    found = [Text(prompt) for prompt in prompts]
    if piecewise:
        print(prompts[0], end="", flush=True)
    for _, piece in texts.stream(
        writer.model, writer.tokenizer, found, config.max_new_tokens, config.sampling, config.stop, writer.generator,
        writer.draft, config.compile,
    ):  # fmt: skip
        first = first or time.perf_counter()
        if piecewise:
            print(piece, end="", flush=True)
    if piecewise:
        print(flush=True)
    return found, first
