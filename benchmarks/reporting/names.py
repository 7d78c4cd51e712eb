"""Names of suites, passes and providers, and their order in a report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KEY = ["suite", "case", "mode", "provider"]
MODEL_SUITES = ("training", "generation")
SUITES = {
    "training": "Training step",
    "generation": "Generation",
    "layer_norm": "Layer norm",
    "add_layer_norm": "Residual addition and layer norm",
    "gelu_ffn": "GELU feed-forward",
    "ffn_up": "Linear and ReLU",
    "causal_attention": "Causal attention",
    "causal_attention_qkvpacked": "Causal attention, packed QKV",
    "decode_attention": "Decode attention",
    "int8_linear": "Int8 linear layer",
    "linear_cross_entropy": "Linear and cross-entropy",
}
MODES = {name: name for name in ("step", "generate", "forward", "backward")} | {"both": "forward + backward"}
MAIN = ("triton", "cpu")  # gptfast's backends that figures highlight; "eager" is plain PyTorch
_KINDS = ("", " fused", " unfused", " captured", " compiled", " compiled captured", " int8")
OWN = tuple(backend + kind for backend in (*MAIN, "eager") for kind in _KINDS)


def title(suite: str, mode: str) -> str:
    """Title of a suite's mode; a model suite has only one."""
    return SUITES.get(suite, suite) + ("" if suite in MODEL_SUITES else f", {MODES.get(mode, mode)}")


def sort_order(row: dict[str, Any]) -> tuple:
    """Sort key of the report: suite, mode, dtype, sizes, then gptfast's providers and the peers.

    The last size counts first: the head size or the model, before sequence length and batch.
    """
    sizes = tuple((name, isinstance(size, str), size) for name, size in reversed(row["dims"].items()))
    places = _place(row["suite"], SUITES), _place(row["mode"], MODES)
    return *places, row["dtype"], sizes, row["case"], provider_order(row["provider"])


def provider_order(provider: str) -> tuple[int, str]:
    """Sort key of providers: gptfast's backends in their order, then the others by name."""
    return _place(provider, OWN)


def _place(name: str, known: Iterable[str]) -> tuple[int, str]:
    names = list(known)
    return names.index(name) if name in names else len(names), name
