"""Choice between Triton kernels, faster PyTorch on CPUs and plain PyTorch, for each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import kernels
from kernels import reference, reference_cpu, runtime

Choice = Literal["triton", "cpu", "eager"]
BackendSpec = str | Mapping[str, str]

# the functions behind each choice, by their names in `kernels`, `kernels.reference_cpu` and `kernels.reference`
OPERATORS = {
    "layer_norm": ("layer_norm", "add_layer_norm"),
    "ffn": ("gelu_ffn", "int8_linear"),
    "attention": ("causal_attention", "causal_attention_qkvpacked", "decode_attention"),
    "loss": ("linear_cross_entropy",),
}
# operators with a faster form in `kernels.reference_cpu`
_FASTER_ON_CPU = {
    operator
    for operator, names in OPERATORS.items()
    if any(getattr(reference_cpu, name) is not getattr(reference, name) for name in names)
}
IGNORE_INDEX = -1  # nanoGPT's target for positions that the loss leaves out
_LOGIT_ROWS = 1024  # rows whose logits `token_losses` holds at a time: 200 MB of GPT-2's in float32


class Backend(Mapping[str, Choice]):
    """Namespace of operators: `backend.causal_attention(q, k, v)` runs the chosen implementation.

    As a mapping it gives the choices: `backend["attention"]` is "triton", "cpu" or "eager".

    Args:
        choices: one for each operator of `OPERATORS`.
    """

    layer_norm: Callable[..., Tensor]
    add_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    gelu_ffn: Callable[..., Tensor]
    int8_linear: Callable[..., Tensor]
    causal_attention: Callable[..., Tensor]
    causal_attention_qkvpacked: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]
    linear_cross_entropy: Callable[..., Tensor]

    def __init__(self, **choices: Choice) -> None:
        if set(choices) != set(OPERATORS) or not set(choices.values()) <= set(get_args(Choice)):
            accepted = ", ".join(get_args(Choice))
            raise ValueError(f"Backend needs one of {accepted} for each of {', '.join(OPERATORS)}, got {choices}")
        self._choices = choices
        namespaces = {"triton": kernels, "cpu": reference_cpu, "eager": reference}
        for operator, names in OPERATORS.items():
            for name in names:
                setattr(self, name, getattr(namespaces[choices[operator]], name))

    def __getitem__(self, operator: str) -> Choice:
        return self._choices[operator]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __repr__(self) -> str:
        return f"Backend({', '.join(f'{operator}={choice!r}' for operator, choice in self._choices.items())})"

    def loss(
        self, x: Tensor, head: nn.Module, targets: Tensor, vocab_size: int, need_logits: bool
    ) -> tuple[Tensor | None, Tensor]:
        """Apply the output head and compute the mean cross-entropy.

        Args:
            x: [..., C] final hidden states.
            head: linear layer from C to at least `vocab_size` logits; further columns are padding.
            targets: [...] int64; `IGNORE_INDEX` leaves a position out.
            vocab_size: V.
            need_logits: return logits even where the loss does not compute them.

        Returns:
            Logits [..., V], or None from the Triton loss where they are not needed, and the loss in float32.
        """
        if self["loss"] == "triton":
            # NOTE: reads the head's weight; its forward hooks run only for logits
            loss = self.linear_cross_entropy(x, head.weight, targets, IGNORE_INDEX, vocab_size=vocab_size)
            return (self.logits(x, head, vocab_size) if need_logits else None), loss
        y = self.logits(x, head, vocab_size)  # [..., V]
        return y, reference.cross_entropy(y, targets, IGNORE_INDEX)

    def token_losses(self, x: Tensor, head: nn.Module, targets: Tensor, vocab_size: int) -> Tensor:
        """Compute the cross-entropy of each row of x [N, C], [N] float32. Holds few logits at a time."""
        if self["loss"] == "triton":
            return self.linear_cross_entropy(
                x, head.weight, targets, IGNORE_INDEX, reduction="none", vocab_size=vocab_size
            )
        losses = [
            reference.cross_entropy(self.logits(rows, head, vocab_size), wanted, IGNORE_INDEX, reduction="none")
            for rows, wanted in zip(x.split(_LOGIT_ROWS), targets.split(_LOGIT_ROWS), strict=True)
        ]
        return torch.cat(losses)

    @staticmethod
    def logits(x: Tensor, head: nn.Module, vocab_size: int) -> Tensor:
        """Apply the output head, [..., C] -> [..., V], and drop the logits of vocabulary padding."""
        y = head(x)
        return y if y.shape[-1] == vocab_size else y[..., :vocab_size]

    def require_device(self, device: torch.device) -> None:
        """Raise ValueError if a Triton kernel would have to run on `device` and cannot."""
        reason = runtime.unsupported_reason(device) if "triton" in self._choices.values() else None
        if reason is not None:
            raise ValueError(f"backend 'triton' cannot run: {reason}; move the model to a GPU or use backend='auto'")


class BackendModule(nn.Module):
    """Base of modules that call operators through `self.backend`, which their model sets."""

    backend: Backend


def parse_backend(spec: BackendSpec) -> dict[str, str]:
    """Parse a request into "auto", "triton", "cpu" or "eager" for each operator.

    Args:
        spec: one of those words for all operators, or a mapping from operator to word, also written as
            "attention=triton,ffn=eager". Operators that are not named get "auto".

    Raises:
        ValueError: an unknown word or operator.
    """
    if isinstance(spec, str) and "=" in spec:
        pairs = [pair.partition("=") for pair in spec.split(",")]
        spec = {operator.strip(): word.strip() for operator, _, word in pairs}
    if isinstance(spec, str):
        spec = dict.fromkeys(OPERATORS, spec)
    if not isinstance(spec, Mapping):
        raise ValueError(f"backend must be a word or a mapping from operator to word, got {spec!r}")
    accepted = ("auto", *get_args(Choice))
    for operator, word in spec.items():
        if operator not in OPERATORS:
            raise ValueError(f"unknown operator {operator!r} in backend; accepted: {', '.join(OPERATORS)}")
        if word not in accepted:
            raise ValueError(f"unknown backend {word!r}; accepted: {', '.join(accepted)}")
    return {operator: spec.get(operator, "auto") for operator in OPERATORS}


def resolve_backend(requested: Mapping[str, str], device: torch.device, dtype: torch.dtype, head_size: int) -> Backend:
    """Choose an implementation for each operator.

    "auto" never fails: it takes "triton" on GPUs where it can run, "cpu" on CPUs, else "eager". For operators without a
    faster form on CPUs "cpu" gives "eager".

    Args:
        requested: result of `parse_backend`.
        device: of the model.
        dtype: of the model's parameters.
        head_size: width of one attention head.

    Raises:
        ValueError: "triton" or "cpu" was requested where it cannot run; the message has the reason and the way out.
    """
    choices: dict[str, Any] = {}
    for operator, word in requested.items():
        if word == "auto":
            word = {"cuda": "triton", "cpu": "cpu"}.get(device.type, "eager")
            if _unavailable(word, operator, device, dtype, head_size) is not None:
                word = "eager"
        reason = _unavailable(word, operator, device, dtype, head_size)
        if reason is not None:
            raise ValueError(f"backend {word!r} cannot run {operator}: {reason}; use backend='auto' or 'eager'")
        choices[operator] = "eager" if word == "cpu" and operator not in _FASTER_ON_CPU else word
    return Backend(**choices)


def reasons(device: torch.device, dtype: torch.dtype, head_size: int) -> dict[str, str | None]:
    """Explain for each operator why "auto" does not choose Triton, None where it does. Arguments as above."""
    if device.type != "cuda":
        reason = runtime.unsupported_reason(device) or "Triton's interpreter runs only on request"
        return dict.fromkeys(OPERATORS, reason)
    return {operator: _unavailable("triton", operator, device, dtype, head_size) for operator in OPERATORS}


def _unavailable(word: str, operator: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    """Return the reason why an implementation cannot run an operator in this process, or None."""
    if word == "cpu":
        # operators have shapes on the meta device, whatever runs them later
        return None if device.type in ("cpu", "meta") else f"the model is on {device.type!r}, 'cpu' is accepted"
    if word == "eager":
        return None
    if dtype not in runtime.DTYPES:
        return f"the dtype is {dtype}, float32, float16 or bfloat16 is accepted"
    if operator == "attention" and head_size > runtime.MAX_HEAD_SIZE:
        return f"the head size is {head_size}, at most {runtime.MAX_HEAD_SIZE} is accepted"
    # a model on the CPU may move to the GPU later
    if device.type == "cpu" and torch.cuda.is_available():
        return None if runtime.TRITON_INSTALLED else "Triton is not installed"
    return runtime.unsupported_reason(device)
