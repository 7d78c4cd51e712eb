"""Models and their tokenizers by name: run folders, Hugging Face's layout and the hub."""

from __future__ import annotations

from pathlib import Path

import torch

from gptfast import tokenizers
from gptfast.checkpoint import run_folder
from gptfast.huggingface import hub
from gptfast.huggingface import tokenizer as huggingface_tokenizer
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer


def load(
    name: str | Path, device: torch.device, tokenizer: str = "gpt2", vocabulary: str | None = None
) -> tuple[GPT, Tokenizer]:
    """Load a model in float32, with the backend "auto", and its tokenizer.

    Args:
        name: a run folder, a folder in Hugging Face's layout, a repository OWNER/MODEL on the hub, or gpt2,
            gpt2-medium, gpt2-large or gpt2-xl.
        device: for the model.
        tokenizer: a tiktoken encoding or "byte", for a model without a tokenizer. Runs, exported folders and GPT-2
            have one.
        vocabulary: folder with the files of that encoding, for machines without a network.

    Raises:
        ValueError: no such model, a damaged one, or a tokenizer with another vocabulary.
    """
    model, own = with_tokenizer(name)
    if own is None:
        if tokenizer in ("char", "word"):
            problem = f"{name} has no tokenizer, and {tokenizer!r} needs its training text"
            raise ValueError(f"{problem}; accepted: byte, or a tiktoken encoding")
        own = tokenizers.for_documents(tokenizer, [], vocabulary=vocabulary)
        require_same_vocabulary(str(name), model, own, f"tokenizer {tokenizer!r}")
    return model.to(device), own


def with_tokenizer(name: str | Path) -> tuple[GPT, Tokenizer | None]:
    """Load a model on the CPU, and the tokenizer beside it: a run's, an exported one, or GPT-2's; else None.

    Raises:
        ValueError: no such model, a damaged one, or a tokenizer with another vocabulary.
    """
    path = Path(name).expanduser()
    # a folder that is neither gets the run's error message; one called gpt2 may hold anything
    neither = path.exists() and not (path / "config.json").is_file() and str(name) not in hub.NAMES
    if run_folder.is_run(path) or neither:
        return load_run(path)
    folder = hub.locate(name)
    model, exported = GPT.from_pretrained(folder), huggingface_tokenizer.read_exported(folder)
    if exported is None:
        gpt2 = huggingface_tokenizer.read_gpt2(folder)
        return model, gpt2 if gpt2 and gpt2.vocab_size == model.config.vocab_size else None
    require_same_vocabulary(str(folder), model, exported, f"its {huggingface_tokenizer.OWN_FILE}")
    return model, exported


def load_run(path: str | Path) -> tuple[GPT, Tokenizer]:
    """Load the model, on the CPU, and the tokenizer of a run folder.

    Raises:
        ValueError: no run folder, a damaged one, or files that do not fit each other.
    """
    path = Path(path).expanduser()
    config, state_dict, tokenizer = run_folder.read_model(path)
    model = GPT.from_state_dict(config, state_dict, problem=f"{path / 'model.safetensors'} does not fit config.json")
    require_same_vocabulary(str(path), model, tokenizer, "its tokenizer.json")
    return model, tokenizer


def require_same_vocabulary(name: str, model: GPT, tokenizer: Tokenizer, origin: str = "the tokenizer") -> None:
    """Raise ValueError unless a tokenizer has as many tokens as its model."""
    expected = model.config.vocab_size
    if tokenizer.vocab_size != expected:
        raise ValueError(
            f"{name} has a vocabulary of {expected} tokens, {origin} has {tokenizer.vocab_size}; give the model's own "
            "tokenizer, such as --tokenizer gpt2"
        )
