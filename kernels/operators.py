"""The operators' modules. Importing one imports Triton, so each is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from kernels import reference, runtime


def module_of(name: str) -> ModuleType:
    """The module that holds the operator `name`: its Triton kernels, or the reference where Triton is not installed."""
    return import_module(f"kernels.{reference.OPERATORS[name]}") if runtime.TRITON_INSTALLED else reference


def modules() -> list[ModuleType]:
    """Every operator's module, each once."""
    return [import_module(f"kernels.{module}") for module in dict.fromkeys(reference.OPERATORS.values())]
