"""Guard against another package named `kernels`, such as Hugging Face's, in place of this project's."""

from __future__ import annotations

import importlib.util
from importlib.abc import InspectLoader
from pathlib import Path

OURS = Path(__file__).parents[1] / "kernels"
_MARKER = "hf_kernels"  # imported by this project's __init__.py only
_REINSTALL = "install gptfast again (pip install --force-reinstall --no-deps)"


def require_own_kernels() -> None:
    """Raise ImportError, with a way out, unless `import kernels` gives this project's operators.

    Nothing is imported for the check, because another package may have side effects.
    """
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        raise ImportError(f"gptfast's package kernels is missing, expected in {OURS}; {_REINSTALL}")
    found = Path(next(iter(spec.submodule_search_locations or [spec.origin or "kernels"])))
    if spec.origin is None:  # a namespace package
        raise ImportError(
            f"gptfast's package kernels is damaged: {found} has no __init__.py, which the removal of Hugging Face's "
            f"package of the same name deletes; {_REINSTALL}"
        )
    source = spec.loader.get_source("kernels") if isinstance(spec.loader, InspectLoader) else None
    if source is None or _MARKER in source:  # no source: only byte code is installed, which is not checked
        return
    if (found / "reference.py").is_file():
        raise ImportError(
            f"another package kernels, such as Hugging Face's, was installed over gptfast's in {found}; "
            f"pip uninstall kernels, then {_REINSTALL}"
        )
    raise ImportError(
        f"kernels in {found} is not gptfast's package in {OURS} and comes first on sys.path: Hugging Face's package "
        f"has the same name; pip uninstall kernels, or put {OURS.parent} before {found.parent}, with which both work: "
        f"PYTHONPATH={OURS.parent}"
    )
