"""Where training text comes from: the standard library, Tiny Shakespeare, small texts, or files of one's own."""

from __future__ import annotations

import hashlib
import http.client
import os
import sysconfig
import tempfile
import urllib.request
from pathlib import Path

from gptfast.data.texts import TEXTS

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

NAMES = ("stdlib", "shakespeare", *TEXTS)
"""Texts that need no path."""


def load(source: str) -> str:
    """The text of a source.

    Args:
        source: one of `NAMES`, or the path of a UTF-8 text file or of a folder of such files.

    Raises:
        ValueError: the source is not there, is empty, is not text, or cannot be downloaded.
    """
    if source == "stdlib":
        return standard_library()
    if source == "shakespeare":
        return shakespeare()
    if source in TEXTS:
        return TEXTS[source]
    path = Path(source).expanduser()
    if path.is_dir():
        text = "\n".join(map(_file, visible_files(path)))
    elif path.is_file():
        text = _file(path)
    else:
        raise ValueError(f"no such data: {source!r}; accepted: {', '.join(NAMES)}, or a text file or folder")
    if not text:
        raise ValueError(f"{source} is empty; a file or folder with text is needed")
    return text


def standard_library() -> str:
    """The running Python's own source: every ASCII module of the standard library, in the order of their paths.

    Test suites and installed packages are left out. The same Python gives the same text.
    """
    return "\n".join(standard_library_modules())


def standard_library_modules() -> list[str]:
    """The modules of `standard_library`, one by one."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    modules = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out]
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    contents = (path.read_bytes() for path in sorted(modules, key=lambda path: path.relative_to(root).as_posix()))
    # other alphabets would add thousands of characters that occur a few times each
    texts = [content.decode("ascii").replace("\r\n", "\n") for content in contents if content.isascii()]
    if not any(texts):
        raise ValueError(f"this Python has no standard library sources in {root}; give a text file as data")
    return texts


def shakespeare() -> str:
    """Tiny Shakespeare: downloaded once, its checksum verified, kept in the cache folder (XDG_CACHE_HOME/gptfast).

    Raises:
        ValueError: it is not cached and cannot be downloaded, or what came is not it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "gptfast")
    path = cache / "tinyshakespeare.txt"
    if path.is_file() and _is_shakespeare(path.read_bytes()):
        return path.read_text(encoding="utf-8")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:  # the second: a connection lost half-way, or no HTTP at all
        raise ValueError(
            f"Tiny Shakespeare could not be downloaded from {SHAKESPEARE_URL} ({' '.join(str(error).split())}); "
            "use --data FILE with a copy of it, or --data stdlib"
        ) from error
    if not _is_shakespeare(content):
        raise ValueError(f"what {SHAKESPEARE_URL} sent is not Tiny Shakespeare (wrong checksum); use --data FILE")
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
    """All files below a folder in the order of their paths, hidden ones left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # as it is, line ends too, as `gptfast prepare` reads it
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
