"""Hugging Face's package of the same name, for those who look for it where this one is found.

Both are imported as `kernels`, and Python takes the one whose folder comes first. Where that is this one and theirs is
installed too, `transformers` and others still count on it: they find the version of the installed distribution, and
do `from kernels import get_kernel`. So modules that are not here come from their folder, and names that are not here
from their `__init__.py`, which runs when it is first asked for one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

OURS = Path(__file__).parent
_ALIAS = "kernels._hugging_face"  # of their __init__.py, whose own name is taken


def installed() -> tuple[Path, str] | None:
    """The folder of their package and its version; None where the distribution `kernels` is not installed.

    The folder is this package's own where one of the two was installed over the other.
    """
    try:
        distribution = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file("kernels"))), distribution.version


def folders() -> list[str]:
    """Where else modules of `kernels` are."""
    found = installed()
    return [] if found is None or not found[0].is_dir() or found[0].samefile(OURS) else [str(found[0])]


def overwritten(version: str) -> str:
    """What to say where this package was installed over theirs."""
    return (
        f"gptfast's package kernels was installed over Hugging Face's (kernels {version}) in {OURS}, of which nothing "
        "works now; pip uninstall kernels, then install gptfast again (pip install --force-reinstall --no-deps); to "
        "have both, install one of them into another folder on sys.path (pip install --target FOLDER)"
    )


def attribute(name: str, operators: Iterable[str]) -> Any:
    """What their package has under a name.

    Args:
        name: which this package has not.
        operators: that it has, for the message.

    Raises:
        AttributeError: it is not installed, or has no such thing.
        ImportError: it was installed, and this package over it.
    """
    # Python asks so before it imports a module of this package, and for much that begins like this
    own = (OURS / f"{name}.py").is_file() or (name.startswith("__") and name != "__version__")
    theirs = None if own else _package()
    if theirs is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}; its operators are {', '.join(operators)}")
    return getattr(theirs, name)


@functools.cache
def _package() -> ModuleType | None:
    """Their package, under another name; None where it is not installed."""
    found = installed()
    if found is None or not found[0].is_dir():
        return None
    folder, version = found
    if folder.samefile(OURS):
        raise ImportError(overwritten(version))
    spec = importlib.util.spec_from_file_location(_ALIAS, folder / "__init__.py")
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[_ALIAS] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[_ALIAS]
        raise
    return module
