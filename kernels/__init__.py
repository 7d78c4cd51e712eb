"""Triton operators for GPT models, usable one by one.

`kernels` and `kernels.reference` export the same functions with the same signatures: the first launches Triton
kernels, the second is eager PyTorch and the definition of correct. Triton is imported when an operator is first used,
never by `import kernels`; where Triton is not installed, the names resolve to the reference.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kernels import hf_kernels, reference, runtime
from kernels.int8_weights import quantize_int8
from kernels.precompile import warmup

if TYPE_CHECKING:
    from kernels.attention import causal_attention, causal_attention_qkvpacked
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.decode import decode_attention
    from kernels.ffn import gelu_ffn
    from kernels.int8 import int8_linear
    from kernels.norm import add_layer_norm, layer_norm

__all__ = [
    "add_layer_norm",
    "causal_attention",
    "causal_attention_qkvpacked",
    "decode_attention",
    "gelu_ffn",
    "int8_linear",
    "layer_norm",
    "linear_cross_entropy",
    "quantize_int8",
    "reference",
    "warmup",
]

_MODULE_OF = {
    "add_layer_norm": "norm",
    "causal_attention": "attention",
    "causal_attention_qkvpacked": "attention",
    "decode_attention": "decode",
    "gelu_ffn": "ffn",
    "int8_linear": "int8",
    "layer_norm": "norm",
    "linear_cross_entropy": "loss",
}

__path__ += hf_kernels.folders()


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        return hf_kernels.attribute(name, _MODULE_OF)
    if runtime.TRITON_INSTALLED:
        operator = getattr(import_module(f"kernels.{_MODULE_OF[name]}"), name)
    else:
        operator = getattr(reference, name)
    globals()[name] = operator
    return operator
