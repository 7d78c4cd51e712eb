"""A model by its name on the command line, with its tokenizer: a run, a folder in Hugging Face's layout, or GPT-2."""

from __future__ import annotations

from pathlib import Path

import torch

from gptfast import tokenizers
from gptfast.checkpoint import run_folder
from gptfast.huggingface import hub
from gptfast.huggingface.read import with_tokenizer
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer


def load(
    name: str, device: torch.device, tokenizer: str = "gpt2", vocabulary: str | None = None
) -> tuple[GPT, Tokenizer]:
    """A model on `device` in float32, with the eager backend, and its tokenizer.

    Args:
        name: a run folder, a folder in Hugging Face's layout, or gpt2, gpt2-medium, gpt2-large or gpt2-xl.
        device: for the model.
        tokenizer: of a model that does not bring its own, as runs, what `gptfast export` wrote and GPT-2 do: an
            encoding of tiktoken, or "byte".
        vocabulary: folder with the files of that encoding, for machines without a network.

    Raises:
        ValueError: there is no such model, it is damaged, or the tokenizer is of another vocabulary.
    """
    path = Path(name).expanduser()
    # of a folder that is neither, what a run has to have is said; but one called gpt2 may hold anything
    neither = path.exists() and not (path / "config.json").is_file() and name not in hub.NAMES
    if run_folder.is_run(path) or neither:
        return run_folder.load(path, device, "eager")
    model, found = with_tokenizer(str(path) if path.is_dir() else name, "eager")
    if found is None:
        if tokenizer in ("char", "word"):
            raise ValueError(
                f"{name} does not bring its tokenizer, and {tokenizer!r} cannot be told from a model; accepted: byte, "
                "or an encoding of tiktoken"
            )
        found = tokenizers.for_documents(tokenizer, [], vocabulary=vocabulary)
    if found.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{name} has a vocabulary of {model.config.vocab_size} tokens, {tokenizer!r} one of {found.vocab_size}; "
            "give the model's own with --tokenizer"
        )
    return model.to(device), found
