"""Models that others have trained: GPT-2 and what has its architecture, from a folder or the Hugging Face hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gptfast.backend import Request
from gptfast.huggingface import config, hub, tokenizer, weights
from gptfast.model import GPT
from gptfast.tokenizers import Tokenizer


def from_pretrained(
    model_type: str | Path, override_args: dict[str, float] | None = None, backend: Request = "auto"
) -> GPT:
    """A model in Hugging Face's layout, in float32 and without dropout.

    Args:
        model_type: a folder with `config.json` and `model.safetensors` (or several such files and their index), a
            repository OWNER/MODEL on the hub, or "gpt2", "gpt2-medium", "gpt2-large" or "gpt2-xl". A folder of that
            name goes before the hub; from there files are downloaded once.
        override_args: "dropout" to train on with another one than none, and "pad_vocab_size_to".
        backend: as for `GPT`.

    Raises:
        ValueError: an unknown name, files that are missing, damaged or do not fit each other, an architecture that this
            GPT is not, or a hub that cannot be reached.
    """
    overrides = dict(override_args or {})
    if not set(overrides) <= {"dropout", "pad_vocab_size_to"}:
        raise ValueError(f"override_args accepts dropout and pad_vocab_size_to, got {', '.join(overrides)}")
    return _model(_folder(str(model_type)), overrides, backend)


def with_tokenizer(name: str, backend: Request = "auto") -> tuple[GPT, Tokenizer | None]:
    """A model as `from_pretrained` gives it, and the tokenizer that is beside it, if it is known.

    That is what `gptfast export` wrote, or GPT-2's own in the files of Hugging Face's models.

    Args:
        name: as for `from_pretrained`.
        backend: as for `GPT`.

    Raises:
        ValueError: as `from_pretrained`, or a tokenizer that is damaged or of another vocabulary.
    """
    folder = _folder(name)
    model, found = _model(folder, {}, backend), tokenizer.read(folder)
    if found is None:
        theirs = tokenizer.of_gpt2(folder)
        return model, theirs if theirs and theirs.vocab_size == model.config.vocab_size else None
    if found.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"{folder / tokenizer.OURS} does not fit config.json: it has {found.vocab_size} tokens, the model "
            f"{model.config.vocab_size}; without that file, --tokenizer gives another"
        )
    return model, found


def _model(folder: Path, overrides: dict[str, float], backend: Request) -> GPT:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    settings = dataclasses.replace(config.read(folder / "config.json"), **overrides)  # type: ignore[arg-type]
    settings, tensors = weights.without_zeros(settings, weights.read(folder))
    model = GPT(settings, backend)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights.fitted(folder, settings, tensors, shapes))
    return model


def _folder(name: str) -> Path:
    local, repository = Path(name).expanduser(), hub.repository(name)
    # a folder called gpt2 may hold anything
    if local.is_dir() and (name not in hub.NAMES or (local / "config.json").is_file()):
        return local
    if repository is None:
        raise ValueError(
            f"no pretrained model {name!r}; accepted: {', '.join(hub.NAMES)}, OWNER/MODEL on the Hugging Face hub, "
            "or a local folder"
        )
    return hub.download(repository)
