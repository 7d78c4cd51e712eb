"""The switch between Triton and eager PyTorch, one choice per operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

import kernels
from kernels import reference, reference_cpu, runtime

Choice = Literal["triton", "eager"]
Request = str | Mapping[str, str]

# the operators behind each choice, by their names in `kernels` and `kernels.reference`
OPERATORS = {
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "ffn": ("gelu_ffn", "int8_linear"),
    "attention": ("causal_attention", "causal_attention_qkvpacked", "decode_attention"),
    "loss": ("linear_cross_entropy",),
}


class Backend(Mapping[str, Choice]):
    """A namespace of operators, and the choices that made it.

    As a mapping it tells the choice of each operator: `backend["attention"]` is `"triton"` or `"eager"`. Its attributes
    are the functions themselves: `backend.causal_attention(q, k, v)`.

    Args:
        device: of the model.
        choices: for each operator.
    """

    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    gelu_ffn: Callable[..., Tensor]
    int8_linear: Callable[..., Tensor]
    causal_attention: Callable[..., Tensor]
    causal_attention_qkvpacked: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]

    def __init__(self, device: torch.device, **choices: Choice) -> None:
        if set(choices) != set(OPERATORS) or not set(choices.values()) <= {"triton", "eager"}:
            raise ValueError(f"Backend needs 'triton' or 'eager' for each of {', '.join(OPERATORS)}, got {choices}")
        self._choices = choices
        eager = reference_cpu if device.type == "cpu" else reference
        for operator, names in OPERATORS.items():
            for name in names:
                setattr(self, name, getattr(kernels if choices[operator] == "triton" else eager, name))

    def __getitem__(self, operator: str) -> Choice:
        return self._choices[operator]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __repr__(self) -> str:
        return f"Backend({', '.join(f'{operator}={choice!r}' for operator, choice in self._choices.items())})"


class Switched:
    """What a module is besides, whose operators are those of its model's backend."""

    backend: Backend


def parse(request: Request) -> dict[str, str]:
    """What is asked for each operator: "auto", "triton" or "eager".

    Args:
        request: one of those words for all operators, or a mapping from operator to word, also written as
            "attention=triton,ffn=eager"; the rest is "auto".

    Raises:
        ValueError: an unknown word or operator.
    """
    if isinstance(request, str) and "=" in request:
        pairs = [pair.partition("=") for pair in request.split(",")]
        request = {operator.strip(): word.strip() for operator, _, word in pairs}
    if isinstance(request, str):
        _require_word(request)
        return dict.fromkeys(OPERATORS, request)
    if not isinstance(request, Mapping):
        raise ValueError(f"backend must be a word or a mapping from operator to word, got {type(request).__name__}")
    for operator, word in request.items():
        if operator not in OPERATORS:
            raise ValueError(f"unknown operator {operator!r} in backend; accepted: {', '.join(OPERATORS)}")
        _require_word(word)
    return {operator: request.get(operator, "auto") for operator in OPERATORS}


def _require_word(word: object) -> None:
    if word not in ("auto", "triton", "eager"):
        raise ValueError(f"unknown backend {word!r}; accepted: auto, triton, eager")


def resolve(asked: Mapping[str, str], device: torch.device, dtype: torch.dtype, head_size: int) -> Backend:
    """Decide for each operator. "auto" is Triton on CUDA devices where it can run, and never fails.

    Args:
        asked: what `parse` returned.
        device: where the model is.
        dtype: of the model's parameters.
        head_size: width of one attention head.

    Raises:
        ValueError: "triton" was asked for where it cannot run; the message names the reason and the way out.
    """
    choices: dict[str, Choice] = {}
    for operator, word in asked.items():
        if word == "eager" or (word == "auto" and device.type != "cuda"):
            choices[operator] = "eager"
            continue
        reason = _why_not(operator, device, dtype, head_size)
        if word == "triton" and reason is not None:
            raise ValueError(f"backend 'triton' cannot run {operator}: {reason}; use backend='auto' or 'eager'")
        choices[operator] = "triton" if reason is None else "eager"
    return Backend(device, **choices)


def reasons(device: torch.device, dtype: torch.dtype, head_size: int) -> dict[str, str | None]:
    """Why "auto" runs each operator eagerly, None where it takes Triton. Arguments are those of `resolve`."""
    if device.type != "cuda":
        other = runtime.unsupported_reason(device) or "Triton's interpreter is for tests, and asked for by name"
        return dict.fromkeys(OPERATORS, other)
    return {operator: _why_not(operator, device, dtype, head_size) for operator in OPERATORS}


def _why_not(operator: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Why `operator` cannot run as a Triton kernel in this process, wherever the model moves; None where it can."""
    if dtype not in runtime.DTYPES:
        return f"the dtype is {dtype}, float32, float16 or bfloat16 is accepted"
    if operator == "attention" and head_size > runtime.MAX_HEAD_SIZE:
        return f"the head size is {head_size}, at most {runtime.MAX_HEAD_SIZE} is accepted"
    # a model on the CPU may yet move to the GPU
    if device.type == "cpu" and torch.cuda.is_available():
        return None if runtime.TRITON_INSTALLED else "Triton is not installed"
    return runtime.unsupported_reason(device)
