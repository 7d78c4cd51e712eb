"""Triton operators for GPT models, usable one by one.

`kernels` and `kernels.reference` export the same functions with the same signatures: the first launches Triton
kernels, the second is eager PyTorch and the definition of correct. Triton is imported when an operator is first used,
never by `import kernels`. Where Triton is not installed, the names resolve to the reference.
"""

from typing import TYPE_CHECKING, Any

from kernels import hf_kernels, operators, reference
from kernels.precompile import warmup
from kernels.reference import OPERATORS, quantize_int8

if TYPE_CHECKING:
    from kernels.reference import *  # noqa: F403

__all__ = [*OPERATORS, "quantize_int8", "reference", "warmup"]

__path__ += hf_kernels.folders()  # noqa: F405


def __getattr__(name: str) -> Any:
    if name not in OPERATORS:
        return hf_kernels.attribute(name, OPERATORS)
    operator = getattr(operators.module_of(name), name)
    globals()[name] = operator
    return operator
