"""Argument checks of every operator, shared by its implementations so that all reject the same input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import runtime

ACTIVATIONS = ("gelu_tanh", "gelu", "relu")
FFN_IMPLEMENTATIONS = ("auto", "fused", "unfused")
REDUCTIONS = ("none", "mean", "sum")


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None) -> None:
    _tensors("layer_norm", ("weight", "bias"), x=x, weight=weight, bias=bias)
    _norm_parameters("layer_norm", x, weight, bias, eps, dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dropout_p: float,
    seed: int | Tensor | None, dtype: torch.dtype | None,
) -> None:  # fmt: skip
    _tensors("add_layer_norm", ("weight", "bias"), x=x, residual=residual, weight=weight, bias=bias)
    _norm_parameters("add_layer_norm", x, weight, bias, eps, dtype)
    if residual.shape != x.shape:
        raise _wrong_shape("add_layer_norm", "residual", residual, f"{tuple(x.shape)}, the shape of x")
    _dropout("add_layer_norm", dropout_p, seed, "x", x.device)


def _norm_parameters(
    operator: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None
) -> None:
    _rows(operator, x)
    width = x.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (width,):
            raise _wrong_shape(operator, name, tensor, f"[C] = [{width}] for x of shape {tuple(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"{operator}: eps must be at least 0, got {eps}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{operator}: dtype must be a floating one or None, got {dtype}")


def gelu_ffn(
    x: Tensor, w_up: Tensor, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None, activation: str,
    implementation: str,
) -> None:  # fmt: skip
    _tensors("gelu_ffn", ("b_up", "b_down"), x=x, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down)
    _same_dtype("gelu_ffn", x=x, w_up=w_up, b_up=b_up, w_down=w_down, b_down=b_down)
    _one_of("gelu_ffn", "activation", activation, ACTIVATIONS)
    _one_of("gelu_ffn", "implementation", implementation, FFN_IMPLEMENTATIONS)
    _rows("gelu_ffn", x)
    _weight("gelu_ffn", "w_up", w_up, x, "[F, C]")
    hidden, width = w_up.shape
    expected = (("w_down", w_down, (width, hidden)), ("b_up", b_up, (hidden,)), ("b_down", b_down, (width,)))
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise _wrong_shape("gelu_ffn", name, tensor, shape)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout_p: float, seed: int | Tensor | None
) -> None:
    _tensors("causal_attention", q=q, k=k, v=v)
    _same_dtype("causal_attention", q=q, k=k, v=v)
    if q.dim() != 4 or q.shape[3] == 0:
        raise _wrong_shape("causal_attention", "q", q, "[B, H, T, D] with D >= 1")
    _keys_and_values("causal_attention", q, "k", k, "v", v)
    if q.shape[2] > k.shape[2]:
        raise ValueError(
            f"causal_attention: q has T = {q.shape[2]} rows and k only S = {k.shape[2]}; T <= S is needed, "
            "the last query belongs to the last key"
        )
    _scale("causal_attention", scale)
    _dropout("causal_attention", dropout_p, seed, "q", q.device)


def causal_attention_qkvpacked(qkv: Tensor, scale: float | None, dropout_p: float, seed: int | Tensor | None) -> None:
    _tensors("causal_attention_qkvpacked", qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise _wrong_shape("causal_attention_qkvpacked", "qkv", qkv, "[B, T, 3, H, D] with D >= 1")
    _scale("causal_attention_qkvpacked", scale)
    _dropout("causal_attention_qkvpacked", dropout_p, seed, "qkv", qkv.device)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None) -> None:
    _tensors("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    _same_dtype("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 4 or q.shape[2] == 0 or q.shape[3] == 0:
        raise _wrong_shape("decode_attention", "q", q, "[B, H, T, D] with T >= 1 and D >= 1")
    _keys_and_values("decode_attention", q, "k_cache", k_cache, "v_cache", v_cache)
    _integers("decode_attention", "lengths", lengths, torch.int32, torch.int64)
    if lengths.shape != q.shape[:1] or lengths.device != q.device:
        expected = f"[B] = [{q.shape[0]}] on {q.device}"
        raise _wrong_shape("decode_attention", "lengths", lengths, expected, f" on {lengths.device}")
    _scale("decode_attention", scale)


def quantize_int8(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize_int8: weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"quantize_int8: weight must be float32, float16, bfloat16 or float64, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise _wrong_shape("quantize_int8", "weight", weight, "[N, K] with N >= 1 and K >= 1")


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    operator = "int8_linear"
    _tensors(operator, ("bias",), x=x, scale=scale, bias=bias)
    _integers(operator, "weight (of kernels.quantize_int8)", weight, torch.int8)
    if scale.dtype != torch.float32:
        raise TypeError(f"{operator}: scale must be float32, got {scale.dtype}")
    _rows(operator, x, "K")
    _weight(operator, "weight", weight, x, "[N, K]")
    if weight.device != x.device:
        raise ValueError(f"{operator}: weight is on {weight.device} and x on {x.device}; one device is needed")
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise _wrong_shape(operator, name, tensor, f"[N] = [{weight.shape[0]}]")
    for name, tensor in (("x", x), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{operator}: {name} requires a gradient, but int8 weights are for inference and have no derivative; "
                "call it under torch.no_grad()"
            )


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, vocab_size: int | None,
    label_smoothing: float, z_loss: float, workspace_bytes: int,
) -> None:  # fmt: skip
    operator = "linear_cross_entropy"
    _tensors(operator, x=x, weight=weight)
    _same_dtype(operator, x=x, weight=weight)
    _rows(operator, x)
    _weight(operator, "weight", weight, x, "[V, C]")
    _integers(operator, "targets", targets, torch.int64)
    if targets.shape != x.shape[:-1] or targets.device != x.device:
        expected = f"{list(x.shape[:-1])} on {x.device} for x of shape {tuple(x.shape)}"
        raise _wrong_shape(operator, "targets", targets, expected, f" on {targets.device}")
    for name, number, lowest in (
        ("ignore_index", ignore_index, -(2**63)), ("vocab_size", vocab_size, 1), ("workspace_bytes", workspace_bytes, 1)
    ):  # fmt: skip
        if number is None and name == "vocab_size":
            continue
        if not isinstance(number, (int, torch.SymInt)) or isinstance(number, bool) or number < lowest:
            raise ValueError(f"{operator}: {name} must be an integer of at least {lowest}, got {number!r}")
    if vocab_size is not None and vocab_size > weight.shape[0]:
        raise ValueError(f"{operator}: vocab_size must be at most V = {weight.shape[0]}, got {vocab_size}")
    _one_of(operator, "reduction", reduction, REDUCTIONS)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{operator}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{operator}: z_loss must be at least 0 and finite, got {z_loss}")
    # elsewhere reading the targets would synchronise with the device or break the graph
    if type(targets) is Tensor and targets.device.type == "cpu" and not torch.compiler.is_compiling():
        classes = weight.shape[0] if vocab_size is None else vocab_size
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
        if wrong.numel() > 0:
            accepted = f"in [0, {classes}) or ignore_index = {ignore_index}"
            raise ValueError(f"{operator}: targets must be {accepted}, got {int(wrong[0])}")


def _wrong_shape(operator: str, name: str, tensor: Tensor, expected: object, where: str = "") -> ValueError:
    return ValueError(f"{operator}: {name} must be {expected}, got shape {tuple(tensor.shape)}{where}")


def _one_of(operator: str, name: str, choice: str, choices: tuple[str, ...]) -> None:
    if choice not in choices:
        raise ValueError(f"{operator}: {name} must be one of {', '.join(choices)}, got {choice!r}")


def _rows(operator: str, x: Tensor, width: str = "C") -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise _wrong_shape(operator, "x", x, f"[..., {width}] with {width} >= 1")


def _weight(operator: str, name: str, weight: Tensor, x: Tensor, expected: str) -> None:
    """Require a matrix of at least one row, as long as those of x."""
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise _wrong_shape(operator, name, weight, f"{expected} with a row or more, for x of shape {tuple(x.shape)}")


def _integers(operator: str, name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{operator}: {name} must be a tensor of {accepted}, got {given}")


def _keys_and_values(operator: str, q: Tensor, k_name: str, k: Tensor, v_name: str, v: Tensor) -> None:
    """Require keys [B, H, S, D] for q [B, H, T, D], and values of the same shape."""
    batch, heads, _, head_size = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, head_size):
        raise _wrong_shape(operator, k_name, k, f"[B, H, S, D] = [{batch}, {heads}, S, {head_size}]")
    if v.shape != k.shape:
        raise _wrong_shape(operator, v_name, v, f"{tuple(k.shape)}, the shape of {k_name}")


def _scale(operator: str, scale: float | None) -> None:
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{operator}: scale must be finite, got {scale}")


def _dropout(operator: str, dropout_p: float, seed: int | Tensor | None, beside: str, device: torch.device) -> None:
    """Require a valid probability and a seed on `device`, which is that of the argument named `beside`."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{operator}: dropout_p must be in [0, 1), got {dropout_p}")
    if isinstance(seed, Tensor) and seed.device != device:
        raise ValueError(f"{operator}: seed is on {seed.device} and {beside} on {device}; one device is needed")
    if isinstance(seed, int) and not -(2**63) <= seed < 2**63:
        raise ValueError(f"{operator}: seed must fit in 64 bits, got {seed}")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(f"{operator}: a tensor seed must hold one int64, got {seed.numel()} elements of {seed.dtype}")
    if seed is not None and not isinstance(seed, (int, Tensor)):
        raise TypeError(f"{operator}: seed must be an int, an int64 tensor or None, got {type(seed).__name__}")


def _tensors(operator: str, optional: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """Require floating tensors on the device of the first one. Those named in `optional` may be None."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{operator}: {name} must have a floating dtype, got {tensor.dtype}")
        if isinstance(first, Tensor) and tensor.device != first.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device} and {first_name} on {first.device}; one device is needed"
            )


def _same_dtype(operator: str, **tensors: Tensor | None) -> None:
    """Require one dtype for all tensors that are not None, as matmuls do, except under autocast, which casts."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.dtype for tensor in present.values()}) == 1:
        return
    if runtime.autocast_dtype(next(iter(present.values())).device) is None:
        given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in present.items())
        raise TypeError(f"{operator}: all tensors must have one dtype, got {given}; cast them or use torch.autocast")
