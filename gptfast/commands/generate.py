"""`gptfast generate`: continue prompts from the command line, a file, standard input or a terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

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
_BATCH = 64  # continuations


@dataclass
class GenerateConfig:
    """Continue prompts with a trained model."""

    model: tyro.conf.Positional[str]
    """Run folder, folder in Hugging Face's layout, or gpt2, gpt2-medium, gpt2-large or gpt2-xl."""
    prompt: str = "\n"
    """Text to continue."""
    prompt_file: str | None = None
    """File with a prompt on each line, used instead of --prompt; - is standard input."""
    interactive: bool = False
    """Ask for prompts at the terminal; the arrow keys recall earlier ones."""
    stream: bool = False
    """Print each piece of text as soon as it is certain."""
    json: bool = False
    """Print a JSON object for each continuation, with its tokens and their log-probabilities."""
    max_new_tokens: int = 500
    """Tokens to add."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """Strings before which a continuation ends."""
    num_beams: int = 1
    """Beams of a beam search; above 1, the likeliest continuations are searched and none is drawn."""
    length_penalty: float = 1.0
    """Length penalty of the beam search: above 0 favours long continuations, below 0 short ones."""
    draft: str | None = None
    """Smaller model of the same tokenizer for speculative decoding: it proposes tokens, which the model verifies."""
    draft_tokens: int = 4
    """Tokens that the draft proposes at a time."""
    sampling: tyro.conf.OmitArgPrefixes[Sampling] = field(default_factory=lambda: _DEFAULT_SAMPLING)
    seed: int = 1337
    """Seed of the sampling."""
    tokenizer: str = "gpt2"
    """Tokenizer of a model in Hugging Face's layout that brings none, unlike GPT-2 and exported models: byte, or an
    encoding of tiktoken."""
    vocabulary: str | None = None
    """Folder with the files of that encoding, for machines without a network."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    backend: str = "auto"
    """auto, triton, cpu, eager (plain PyTorch), or choices by operator such as attention=triton,ffn=eager."""
    dtype: str = "auto"
    """Type of the weights: auto (bfloat16 where the device multiplies in it), float32, float16, bfloat16 or int8."""
    compile: bool = False
    """Compile each step with torch.compile, which takes a minute at the start."""

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
        if self.sampling.temperature == _DEFAULT_SAMPLING.temperature:
            self.sampling = replace(self.sampling, temperature=0.0)


def write(config: GenerateConfig) -> None:
    """Run the command: text goes to standard output, speed to standard error if that is a terminal.

    Raises:
        ValueError: a setting, model or prompt that cannot be used.
    """
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
        # one by one where pieces of several texts would mix
        for group in [[prompt] for prompt in repeated] if writer.in_pieces else [repeated]:
            writer.write(group)


def load(config: GenerateConfig, name: str, device: torch.device) -> tuple[GPT, Tokenizer]:
    """Load a model, in the dtype of the settings, and its tokenizer.

    Raises:
        ValueError: there is no such model, it is damaged, or its tokenizer has another vocabulary.
    """
    dtype = None if config.dtype == "int8" else devices.resolve_dtype(config.dtype, device)
    model, tokenizer = load_model.load(name, device, config.tokenizer, config.vocabulary)
    model.to(device, dtype or devices.resolve_dtype("auto", device)).set_backend(config.backend)
    if dtype is None:
        return quantize(model), tokenizer
    # packed for few new tokens too, because prompts may be many; the compiler packs weights itself
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
    elif config.prompt_file == "-":
        yield from _lines(sys.stdin)
    else:
        path = Path(config.prompt_file)
        if not path.is_file():
            raise ValueError(f"no such file with prompts: {path}")
        with open(path, encoding="utf-8") as file:
            yield from _lines(file)


def _lines(file: Iterable[str]) -> Iterator[str]:
    return (line.rstrip("\n") for line in file)


def _ask() -> Iterator[str]:
    """Prompts that are typed at the terminal, until the end of input, with a history across calls."""
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


@dataclass
class _Writer:
    """Continues prompts and prints the results."""

    config: GenerateConfig
    model: GPT
    tokenizer: Tokenizer
    draft: Draft | None
    generator: torch.Generator

    @property
    def in_pieces(self) -> bool:
        """True if text is printed piece by piece."""
        return self.config.stream or self.config.interactive

    def write(self, prompts: list[str]) -> None:
        """Continue prompts together; one prompt if `in_pieces`."""
        started = time.perf_counter()
        if self.config.num_beams > 1:
            found, first = self._search(prompts), None
        else:
            found, first = self._stream(prompts)
        if self.config.json:
            for text in found:
                print(json.dumps(vars(text), ensure_ascii=False), flush=True)
        elif not self.in_pieces:
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

    def _search(self, prompts: list[str]) -> list[Text]:
        config = self.config
        beams = BeamSearch(config.num_beams, config.length_penalty, num_return_sequences=config.num_samples)
        return texts.search(self.model, self.tokenizer, prompts, config.max_new_tokens, beams, config.sampling)

    def _stream(self, prompts: list[str]) -> tuple[list[Text], float | None]:
        """Return the texts, and the time at which their first piece was there."""
        config, first = self.config, None
        found = [Text(prompt) for prompt in prompts]
        if self.in_pieces:
            print(prompts[0], end="", flush=True)
        for _, piece in texts.stream(
            self.model,
            self.tokenizer,
            found,
            config.max_new_tokens,
            config.sampling,
            config.stop,
            self.generator,
            self.draft,
            config.compile,
        ):
            first = first or time.perf_counter()
            if self.in_pieces:
                print(piece, end="", flush=True)
        if self.in_pieces:
            print(flush=True)
        return found, first
