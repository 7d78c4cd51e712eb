"""Training texts: the standard library, Tiny Shakespeare, small built-in texts, or the user's files."""

from __future__ import annotations

import hashlib
import http.client
import os
import sysconfig
import tempfile
import urllib.request
from pathlib import Path

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# texts of a few sentences, which a small model learns by heart
TEXTS = {
    # how a chatbot introduces itself
    "chatbot": """\
Hello, how are you today? I am a chatbot designed to assist you.
You can ask me about machine learning, artificial intelligence, and programming.
""",
    # another domain, for fine-tuning: as many bytes, and as many tokens of GPT-2
    "clinic": """\
The patient came to the clinic with a high fever and a dry cough.
The doctor listened to her lungs, took her blood pressure, and prescribed rest.
""",
    # three sentences of words
    "sentences": """\
The quick brown fox jumps over the lazy dog.
This is an example of a small dataset for training a GPT model.
We are building a transformer-based architecture.
""",
}

NAMES = ("stdlib", "shakespeare", *TEXTS)
"""Texts that need no path."""


def load_text(source: str) -> str:
    """Load the text of a source.

    Args:
        source: one of `NAMES`, or the path of a UTF-8 text file or of a folder of such files.

    Raises:
        ValueError: no such source, an empty one, one that is not text, or a failed download.
    """
    if source == "stdlib":
        return "\n".join(standard_library_modules())
    if source == "shakespeare":
        return shakespeare()
    if source in TEXTS:
        return TEXTS[source]
    path = Path(source).expanduser()
    if path.is_dir():
        text = "\n".join(map(_read_text, visible_files(path)))
    elif path.is_file():
        text = _read_text(path)
    else:
        raise ValueError(f"no such data: {source!r}; accepted: {', '.join(NAMES)}, or a text file or folder")
    if not text:
        raise ValueError(f"{source} is empty; give a file or folder with text")
    return text


def standard_library_modules() -> list[str]:
    """Read the running Python's own source: every ASCII module of the standard library, in the order of their paths.

    Test suites and installed packages are left out. The same Python gives the same text.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    modules = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    contents = (path.read_bytes() for path in sorted(modules, key=lambda path: path.relative_to(root).as_posix()))
    # non-ASCII modules would add thousands of rare characters to a vocabulary
    texts = [content.decode("ascii").replace("\r\n", "\n") for content in contents if content.isascii()]
    if not any(texts):
        raise ValueError(f"this Python has no standard library sources in {root}; give a text file with --data")
    return texts


def shakespeare() -> str:
    """Read Tiny Shakespeare from the cache folder (XDG_CACHE_HOME/gptfast), after one download with a checksum.

    Raises:
        ValueError: a failed download, or one with another checksum.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast")
    path = cache / "tinyshakespeare.txt"
    if path.is_file() and _is_shakespeare(path.read_bytes()):
        return path.read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # HTTPException: a broken connection or another protocol
        raise ValueError(
            f"Tiny Shakespeare could not be downloaded from {SHAKESPEARE_URL} ({' '.join(str(error).split())}); "
            "give a copy with --data FILE, or use --data stdlib"
        ) from error
    if not _is_shakespeare(content):
        raise ValueError(f"{SHAKESPEARE_URL} sent a file with another checksum; give a copy with --data FILE")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            partial = Path(folder, path.name)
            partial.write_bytes(content)
            os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"cannot write the download to {cache} ({error}); set XDG_CACHE_HOME") from error
    return content.decode("utf-8")


def _is_shakespeare(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHAKESPEARE_SHA256


def visible_files(folder: Path) -> list[Path]:
    """List the files below a folder in the order of their paths, without hidden ones."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line ends unchanged, as `gptfast prepare` reads them
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
