"""Models on the Hugging Face hub, which are downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from gptfast.huggingface import tokenizer, weights

# the names that nanoGPT knows
NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_FILES = ("config.json", weights.FILE, weights.INDEX, "model-?????-of-?????.safetensors", tokenizer.OURS,
          *tokenizer.GPT2_FILES)  # fmt: skip


def repository(name: str) -> str | None:
    """The repository that a name stands for: one of `NAMES`, or OWNER/MODEL itself; None if it is no such name."""
    return NAMES.get(name) or (name if _REPOSITORY.fullmatch(name) else None)


def download(repository: str) -> Path:
    """The folder with a repository's config, weights and tokenizer of ours, from the hub or, where they are, its cache.

    Raises:
        ValueError: there is no such repository, or the hub cannot be reached and its cache lacks the files.
    """
    # it takes a while to import, and folders need none of it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(_FILES)))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"no folder {repository} is here, and the Hugging Face hub has no model of that name, or keeps it private"
        ) from error
    except Exception as error:  # the hub's client raises those of several libraries
        cause = error.__cause__ or error
        reason = (str(cause).strip() or "no reason given").splitlines()[0]
        raise ValueError(
            f"no folder {repository} is here, and it could not be downloaded from the Hugging Face hub "
            f"({type(cause).__name__}: {reason}); give a folder with config.json and {weights.FILE}"
        ) from error
    # out of reach of the hub its client gives what others have left in the cache, such as the tokenizer alone
    for names in (("config.json",), (weights.FILE, weights.INDEX)):
        if not any((folder / name).is_file() for name in names):
            raise ValueError(
                f"{repository} has no {names[0]} in the cache, {folder}: the Hugging Face hub has none, or could not "
                "be reached"
            )
    return folder
