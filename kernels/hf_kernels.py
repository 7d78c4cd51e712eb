"""Access to Hugging Face's package `kernels` behind this package of the same name.

Python imports the `kernels` that comes first on sys.path. If that is this package and theirs is installed too,
`transformers` and others still expect theirs: they find its version in the metadata of the distribution and run
`from kernels import get_kernel`. So `kernels.__path__` ends with the folder of their modules, and names that this
package lacks come from their `__init__.py`, which runs when such a name is first used.
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
_ALIAS = "kernels._hugging_face"  # module name of their __init__.py


def installed() -> tuple[Path, str] | None:
    """Return the folder and version of their package, or None if the distribution `kernels` is not installed.

    If one of the two packages was installed over the other, the folder is this package's.
    """
    try:
        distribution = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file("kernels"))), distribution.version


def folders() -> list[str]:
    """Return the further folders of modules for `kernels.__path__`: theirs, or none."""
    found = installed()
    return [] if found is None or not found[0].is_dir() or found[0].samefile(OURS) else [str(found[0])]


def overwritten(version: str) -> str:
    """Return the error message for an installation of this package over theirs."""
    return (
        f"gptfast's package kernels was installed over Hugging Face's (kernels {version}) in {OURS}, which broke the "
        "latter; pip uninstall kernels, then install gptfast again (pip install --force-reinstall --no-deps); to "
        "have both, install one of them into another folder on sys.path (pip install --target FOLDER)"
    )


def attribute(name: str, operators: Iterable[str]) -> Any:
    """Return the attribute `name` of their package. An AttributeError lists our `operators`.

    Raises ImportError if this package was installed over theirs.
    """
    # Python asks for a submodule's name before it imports the submodule, and for many dunder names
    own = (OURS / f"{name}.py").is_file() or (name.startswith("__") and name != "__version__")
    theirs = None if own else _package()
    if theirs is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}; its operators are {', '.join(operators)}")
    return getattr(theirs, name)


@functools.cache
def _package() -> ModuleType | None:
    """Import their `__init__.py` under another name. None if it is not installed."""
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
