"""Another package called `kernels`, such as Hugging Face's, in the place of this project's."""

from __future__ import annotations

import importlib.util
from importlib.abc import InspectLoader
from pathlib import Path

OURS = Path(__file__).parents[1] / "kernels"
_MARKER = "hf_kernels"  # a module that the __init__.py of no other package imports
_AGAIN = "install gptfast again (pip install --force-reinstall --no-deps)"


def require_own_kernels() -> None:
    """Raise ImportError, with the way out, unless `import kernels` gives this project's operators.

    Nothing is imported for that: another package may do anything.
    """
    spec = importlib.util.find_spec("kernels")
    if spec is None:
        raise ImportError(f"gptfast's package kernels is missing, it should be in {OURS}; {_AGAIN}")
    found = Path(next(iter(spec.submodule_search_locations or [spec.origin or "kernels"])))
    if spec.origin is None:  # a namespace
        raise ImportError(
            f"gptfast's package kernels is damaged: {found} has no __init__.py, which Hugging Face's package of the "
            f"same name takes along when it is uninstalled; {_AGAIN}"
        )
    source = spec.loader.get_source("kernels") if isinstance(spec.loader, InspectLoader) else None
    if source is None or _MARKER in source:  # compiled alone, it tells nothing
        return
    if (found / "reference.py").is_file():
        raise ImportError(
            f"another package called kernels, such as Hugging Face's, was installed over gptfast's in {found}; "
            f"pip uninstall kernels, then {_AGAIN}"
        )
    raise ImportError(
        f"kernels in {found} is another package than gptfast's in {OURS}, and comes first on sys.path: Hugging Face's "
        f"has the same name; pip uninstall kernels, or put {OURS.parent} before {found.parent}, with which both work: "
        f"PYTHONPATH={OURS.parent}"
    )
