"""The command `gptfast generate`: continue prompts from an option, a file, standard input or a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from gptfast import devices, load_model
from gptfast.generation import text as texts
from gptfast.generation.beam_search import BeamSearch
from gptfast.generation.model_cache import for_decoding
from gptfast.generation.sampling import Sampling
from gptfast.generation.speculative import Draft
from gptfast.generation.text import Text
from gptfast.model import GPT
from gptfast.quantization import quantize
from gptfast.tokenizers import Tokenizer

_DEFAULT_SAMPLING = Sampling(temperature=0.8)
_BATCH = 64  # continuations per batch


@dataclass
class GenerateConfig:
    """Continue prompts with a trained model."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Run folder, Hugging Face folder, hub repository OWNER/MODEL, or gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    prompt: str = "\n"
    """Text to continue."""
    prompt_file: str | None = None
    """File with one prompt per line, used instead of --prompt; - is standard input."""
    interactive: bool = False
    """Read prompts from the terminal; the arrow keys recall earlier ones."""
    stream: bool = False
    """Print text as it is generated."""
    json: bool = False
    """Print one JSON object per continuation, with its tokens and their log-probabilities."""
    max_new_tokens: int = 500
    """Maximum number of tokens to add."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """Stop strings. A continuation ends before the first match."""
    num_beams: int = 1
    """Beams of a beam search for the likeliest continuations; 1 samples instead."""
    length_penalty: float = 1.0
    """Length penalty of the beam search: above 0 favours long continuations, below 0 short ones."""
    draft: str | None = None
    """Draft model for speculative decoding: a smaller model with the same tokenizer."""
    draft_tokens: int = 4
    """Tokens that the draft proposes at a time."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: _DEFAULT_SAMPLING)
    seed: int = 1337
    """Seed of the sampling."""
    tokenizer: str = "gpt2"
    """Tokenizer of a model that has none: byte, or a tiktoken encoding. Runs, exported models and GPT-2 have one."""
    vocabulary: str | None = None
    """Folder with the files of a tiktoken encoding, for machines without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Dtype of the weights; auto is bfloat16 where the device has instructions for it."""
    compile: bool = False
    """Compile each decoding step with torch.compile, which takes about a minute at the start."""

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be at least 0, got {self.max_new_tokens}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {self.seed}")
        if self.interactive and (self.prompt_file is not None or self.json):
            raise ValueError("--interactive reads prompts and prints text; it excludes --prompt-file and --json")
        if self.json and self.stream:
            raise ValueError("--json prints whole continuations; it excludes --stream")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {self.num_beams}")
        if self.num_beams > 1:
            self._check_beams()
        if self.draft is not None and self.compile:
            raise ValueError("--draft decodes several tokens at a time; it excludes --compile")
        if not self.prompt and self.prompt_file is None and not self.interactive:
            raise ValueError("the prompt is empty; give at least one character")

    def _check_beams(self) -> None:
        excluded = {"--stream": self.stream, "--stop": self.stop, "--draft": self.draft, "--compile": self.compile}
        given = [name for name, value in excluded.items() if value]
        if given:
            raise ValueError(f"--num-beams searches for whole continuations; it excludes {', '.join(given)}")
        if self.num_samples > self.num_beams:
            raise ValueError(f"num_samples must be at most num_beams={self.num_beams}, got {self.num_samples}")
        if self.sampling.temperature == _DEFAULT_SAMPLING.temperature:
            self.sampling = replace(self.sampling, temperature=0.0)


def write(config: GenerateConfig) -> None:
    """Run the command: text goes to standard output, speed to standard error if that is a terminal."""
    device = devices.resolve(config.device)
    model, tokenizer = load(config, config.model, device)
    generator = torch.Generator(device).manual_seed(config.seed)
    writer = _Writer(config, model, tokenizer, _load_draft(config, tokenizer, device), generator)
    prompts = _ask() if config.interactive else _read_prompts(config)
    batch_size = 1 if config.interactive else max(1, _BATCH // max(config.num_samples, config.num_beams))
    while batch := list(islice(prompts, batch_size)):
        if config.num_beams > 1:
            writer.write(batch)
            continue
        repeated = [prompt for prompt in batch for _ in range(config.num_samples)]
        # pieces of several texts would interleave
        for group in [[prompt] for prompt in repeated] if writer.prints_pieces else [repeated]:
            writer.write(group)


def load(config: GenerateConfig, name: str, device: torch.device) -> tuple[GPT, Tokenizer]:
    """Load a model in the dtype of the config, and its tokenizer.

    Raises:
        ValueError: no such model, a damaged one, or a tokenizer with another vocabulary.
    """
    int8 = config.dtype == "int8"
    model, tokenizer = load_model.load(name, device, config.tokenizer, config.vocabulary)
    model.to(dtype=devices.resolve_dtype("auto" if int8 else config.dtype, device)).set_backend(config.backend)
    if int8:
        return quantize(model), tokenizer
    # packed even for few new tokens, because prompts may be many; the compiler packs weights itself
    return model if config.compile else for_decoding(model.eval()), tokenizer


def _load_draft(config: GenerateConfig, tokenizer: Tokenizer, device: torch.device) -> Draft | None:
    if config.draft is None:
        return None
    model, draft_tokenizer = load(config, config.draft, device)
    if draft_tokenizer.to_json() != tokenizer.to_json():
        raise ValueError(f"--draft {config.draft} has another tokenizer than {config.model}; accepted: the same")
    return Draft(model, config.draft_tokens)


def _read_prompts(config: GenerateConfig) -> Iterator[str]:
    if config.prompt_file is None:
        yield config.prompt
        return
    path, is_stdin = Path(config.prompt_file), config.prompt_file == "-"
    if not is_stdin and not path.is_file():
        raise ValueError(f"no such file with prompts: {path}")
    with nullcontext(sys.stdin) if is_stdin else open(path, encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\n")


def _ask() -> Iterator[str]:
    """Read prompts from the terminal until the end of input, with a history across calls."""
    history = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast", "prompts")
    try:
        import readline
    except ImportError:  # Windows has its own line editor
        readline = None  # type: ignore[assignment]
    if readline is not None and history.is_file():
        readline.read_history_file(history)
    try:
        while True:
            if line := input("> "):
                yield line
    except EOFError:
        print()
    finally:
        if readline is not None:
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(history)


@dataclass
class _Writer:
    """Continues prompts and prints the results."""

    config: GenerateConfig
    model: GPT
    tokenizer: Tokenizer
    draft: Draft | None
    generator: torch.Generator

    @property
    def prints_pieces(self) -> bool:
        return self.config.stream or self.config.interactive

    def write(self, prompts: list[str]) -> None:
        """Continue prompts together; one prompt if `prints_pieces`."""
        config, started, first = self.config, time.perf_counter(), None
        if config.num_beams > 1:
            beams = BeamSearch(config.num_beams, config.length_penalty, num_return_sequences=config.num_samples)
            found = texts.search(self.model, self.tokenizer, prompts, config.max_new_tokens, beams, config.sampling)
        else:
            found = [Text(prompt) for prompt in prompts]
            first = self._stream(found)
        if config.json:
            for text in found:
                print(json.dumps(vars(text), ensure_ascii=False), flush=True)
        elif not self.prints_pieces:
            for text in found:
                print(text.prompt + text.text, flush=True)
        if sys.stderr.isatty():
            seconds, tokens = time.perf_counter() - started, sum(len(text.tokens) for text in found)
            facts = [f"{tokens:,} tokens", f"{tokens / seconds:,.0f} tokens/s"]
            if first is not None:
                facts.append(f"the first text after {first - started:.2f} s")
            if self.draft is not None:
                facts.append(f"{self.draft.acceptance_rate:.0%} of the draft's tokens accepted")
            print(", ".join(facts), file=sys.stderr)

    def _stream(self, found: list[Text]) -> float | None:
        """Fill in the continuations. Return the time of the first piece, None if there is none."""
        config, first = self.config, None
        if self.prints_pieces:
            print(found[0].prompt, end="", flush=True)
        settings = (config.max_new_tokens, config.sampling, config.stop, self.generator, self.draft, config.compile)
        for _, piece in texts.stream(self.model, self.tokenizer, found, *settings):
            first = first or time.perf_counter()
            if self.prints_pieces:
                print(piece, end="", flush=True)
        if self.prints_pieces:
            print(flush=True)
        return first
