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
        raise ValueError(
            f"add_layer_norm: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    _dropout("add_layer_norm", dropout_p, seed, "x", x.device)


def _norm_parameters(
    operator: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None
) -> None:
    _rows(operator, x)
    width = x.shape[-1]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != (width,):
            raise ValueError(
                f"{operator}: {name} must be [C] = [{width}] for x of shape {tuple(x.shape)}, "
                f"got shape {tuple(tensor.shape)}"
            )
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
    if activation not in ACTIVATIONS:
        raise ValueError(f"gelu_ffn: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if implementation not in FFN_IMPLEMENTATIONS:
        accepted = ", ".join(FFN_IMPLEMENTATIONS)
        raise ValueError(f"gelu_ffn: implementation must be one of {accepted}, got {implementation!r}")
    _rows("gelu_ffn", x)
    if w_up.dim() != 2 or w_up.shape[1] != x.shape[-1] or w_up.shape[0] == 0:
        raise ValueError(
            f"gelu_ffn: w_up must be [F, C] = [F, {x.shape[-1]}] with F >= 1, got shape {tuple(w_up.shape)}"
        )
    hidden, width = w_up.shape
    for name, tensor, shape in (
        ("w_down", w_down, (width, hidden)),
        ("b_up", b_up, (hidden,)),
        ("b_down", b_down, (width,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"gelu_ffn: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, dropout_p: float, seed: int | Tensor | None
) -> None:
    _tensors("causal_attention", q=q, k=k, v=v)
    _same_dtype("causal_attention", q=q, k=k, v=v)
    if q.dim() != 4 or q.shape[3] == 0:
        raise ValueError(f"causal_attention: q must be [B, H, T, D] with D >= 1, got shape {tuple(q.shape)}")
    batch, heads, queries, head_size = q.shape
    if k.dim() != 4 or (k.shape[0], k.shape[1], k.shape[3]) != (batch, heads, head_size):
        raise ValueError(
            f"causal_attention: k must be [B, H, S, D] = [{batch}, {heads}, S, {head_size}], got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"causal_attention: v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if queries > k.shape[2]:
        raise ValueError(
            f"causal_attention: q has T = {queries} rows and k only S = {k.shape[2]}; T <= S is needed, "
            "the last query belongs to the last key"
        )
    _scale("causal_attention", scale)
    _dropout("causal_attention", dropout_p, seed, "q", q.device)


def causal_attention_qkvpacked(qkv: Tensor, scale: float | None, dropout_p: float, seed: int | Tensor | None) -> None:
    _tensors("causal_attention_qkvpacked", qkv=qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] == 0:
        raise ValueError(
            f"causal_attention_qkvpacked: qkv must be [B, T, 3, H, D] with D >= 1, got shape {tuple(qkv.shape)}"
        )
    _scale("causal_attention_qkvpacked", scale)
    _dropout("causal_attention_qkvpacked", dropout_p, seed, "qkv", qkv.device)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None) -> None:
    _tensors("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    _same_dtype("decode_attention", q=q, k_cache=k_cache, v_cache=v_cache)
    if q.dim() != 4 or q.shape[2] == 0 or q.shape[3] == 0:
        raise ValueError(f"decode_attention: q must be [B, H, T, D] with T >= 1 and D >= 1, got shape {tuple(q.shape)}")
    batch, heads, _, head_size = q.shape
    if k_cache.dim() != 4 or (k_cache.shape[0], k_cache.shape[1], k_cache.shape[3]) != (batch, heads, head_size):
        raise ValueError(
            f"decode_attention: k_cache must be [B, H, S, D] = [{batch}, {heads}, S, {head_size}], "
            f"got {tuple(k_cache.shape)}"
        )
    if v_cache.shape != k_cache.shape:
        raise ValueError(
            f"decode_attention: v_cache must have the shape of k_cache, {tuple(k_cache.shape)}, "
            f"got {tuple(v_cache.shape)}"
        )
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        given = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"decode_attention: lengths must be an int32 or int64 tensor, got {given}")
    if lengths.shape != (batch,) or lengths.device != q.device:
        raise ValueError(
            f"decode_attention: lengths must be [B] = [{batch}] on {q.device}, "
            f"got shape {tuple(lengths.shape)} on {lengths.device}"
        )
    _scale("decode_attention", scale)


def quantize_int8(weight: Tensor) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize_int8: weight must be a tensor, got {type(weight).__name__}")
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"quantize_int8: weight must be float32, float16, bfloat16 or float64, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"quantize_int8: weight must be [N, K] with N and K of at least 1, got shape {tuple(weight.shape)}"
        )


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    operator = "int8_linear"
    _tensors(operator, ("bias",), x=x, scale=scale, bias=bias)
    if not isinstance(weight, Tensor) or weight.dtype != torch.int8:
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{operator}: weight must be an int8 tensor, got {given}; kernels.quantize_int8 makes one")
    if scale.dtype != torch.float32:
        raise TypeError(f"{operator}: scale must be float32, got {scale.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{operator}: x must be [..., K] with K >= 1, got shape {tuple(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{operator}: weight must be [N, K] = [N, {x.shape[-1]}] with N >= 1, got shape {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"{operator}: weight is on {weight.device} and x on {x.device}; one device is needed")
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise ValueError(f"{operator}: {name} must be [N] = [{weight.shape[0]}], got shape {tuple(tensor.shape)}")
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
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{operator}: weight must be [V, C] = [V, {x.shape[-1]}] with V >= 1, got shape {tuple(weight.shape)}"
        )
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        given = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise TypeError(f"{operator}: targets must be an int64 tensor, got {given}")
    if targets.shape != x.shape[:-1] or targets.device != x.device:
        raise ValueError(
            f"{operator}: targets must be {list(x.shape[:-1])} on {x.device} for x of shape {tuple(x.shape)}, "
            f"got shape {tuple(targets.shape)} on {targets.device}"
        )
    for name, number, lowest in (
        ("ignore_index", ignore_index, -(2**63)), ("vocab_size", vocab_size, 1), ("workspace_bytes", workspace_bytes, 1)
    ):  # fmt: skip
        if number is None and name == "vocab_size":
            continue
        if not isinstance(number, (int, torch.SymInt)) or isinstance(number, bool) or number < lowest:
            raise ValueError(f"{operator}: {name} must be an integer of at least {lowest}, got {number!r}")
    if vocab_size is not None and vocab_size > weight.shape[0]:
        raise ValueError(f"{operator}: vocab_size must be at most V = {weight.shape[0]}, got {vocab_size}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{operator}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{operator}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"{operator}: z_loss must be at least 0 and finite, got {z_loss}")
    _classes(operator, targets, ignore_index, weight.shape[0] if vocab_size is None else vocab_size)


def _classes(operator: str, targets: Tensor, ignore_index: int, classes: int) -> None:
    """Require targets in range, if that takes no host synchronisation and no graph break."""
    if type(targets) is not Tensor or targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= classes))
    if wrong.any():
        raise ValueError(
            f"{operator}: targets must be in [0, {classes}) or ignore_index = {ignore_index}, "
            f"got {int(targets[wrong][0])}"
        )


def _rows(operator: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{operator}: x must be [..., C] with C >= 1, got shape {tuple(x.shape)}")


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
