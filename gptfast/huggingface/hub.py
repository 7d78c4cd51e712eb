"""Folders of models, local or downloaded once from the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from gptfast.huggingface import tokenizer, weights

# the names that nanoGPT accepts
NAMES = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_FILES = ("config.json", weights.FILE, weights.INDEX, "model-?????-of-?????.safetensors", tokenizer.OWN_FILE,
          *tokenizer.GPT2_FILES)  # fmt: skip


def locate(name: str | Path) -> Path:
    """Find the folder of a model, and download it where it is a repository's.

    Args:
        name: a folder, a repository OWNER/MODEL, or one of `NAMES`. A folder is preferred to a repository.

    Raises:
        ValueError: an unknown name, a repository that does not exist, or a hub that cannot be reached.
    """
    name = str(name)
    folder = Path(name).expanduser()
    # a folder called gpt2 may hold anything
    if folder.is_dir() and (name not in NAMES or (folder / "config.json").is_file()):
        return folder
    repository = NAMES.get(name) or (name if _REPOSITORY.fullmatch(name) else None)
    if repository is None:
        raise ValueError(
            f"no pretrained model {name!r}; accepted: {', '.join(NAMES)}, OWNER/MODEL on the Hugging Face hub, or a "
            "local folder"
        )
    return _download(repository)


def _download(repository: str) -> Path:
    """Download a repository's config, weights and tokenizer, or find them in the hub's cache."""
    # slow to import, and local folders do not need it
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repository, allow_patterns=list(_FILES)))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"no local folder {repository}, and the Hugging Face hub has no public model of that name; check the name, "
            "or log in to the hub"
        ) from error
    except Exception as error:  # the hub's client raises errors of several libraries
        cause = error.__cause__ or error
        reason = (str(cause).strip() or "no reason given").splitlines()[0]
        raise ValueError(
            f"no local folder {repository}, and the download from the Hugging Face hub failed "
            f"({type(cause).__name__}: {reason}); give a folder with config.json and {weights.FILE}"
        ) from error
    # offline, the client returns what other programs have left in the cache, such as the tokenizer alone
    for names in (("config.json",), (weights.FILE, weights.INDEX)):
        if not any((folder / name).is_file() for name in names):
            raise ValueError(
                f"{repository} has no {names[0]} in the cache {folder}, and the Hugging Face hub does not have it or "
                "cannot be reached; go online, or give a folder with it"
            )
    return folder
