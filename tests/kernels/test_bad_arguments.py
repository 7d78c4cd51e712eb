"""What operators and their references refuse, before anything is launched, naming the argument."""

from __future__ import annotations

import pytest
import torch

import kernels
from kernels import reference
from tests.support.operators import OPERATORS
from tests.support.oracle import DEVICE


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


LAYER_NORM = [
    ((t(), t(1), None), ValueError, r"x must be \[\.\.\., C\] with C >= 1, got shape \(\)"),
    ((t(3, 0), t(0), None), ValueError, r"x must be .* got shape \(3, 0\)"),
    ((t(3, 4), t(5), None), ValueError, r"weight must be \[C\] = \[4\] .* got shape \(5,\)"),
    ((t(3, 4), t(4), t(3)), ValueError, r"bias must be \[C\] = \[4\] .* got shape \(3,\)"),
    ((t(3, 4), t(4), None, -1.0), ValueError, "eps must be at least 0, got -1.0"),
    ((t(3, 4), t(4), None, 1e-5, torch.int32), TypeError, "dtype must be a floating one or None, got torch.int32"),
    ((t(3, 4, dtype=torch.int64), t(4), None), TypeError, "x must have a floating dtype, got torch.int64"),
    (([[1.0]], t(1), None), TypeError, "x must be a tensor, got list"),
    ((t(3, 4), [1.0], None), TypeError, "weight must be a tensor, got list"),
    ((t(3, 4), t(4).to("meta"), None), ValueError, "weight is on meta and x on"),
]
ADD_LAYER_NORM = [
    ((t(), t(), t(1), None), ValueError, r"x must be \[\.\.\., C\] with C >= 1, got shape \(\)"),
    ((t(3, 0), t(3, 0), t(0), None), ValueError, r"x must be .* got shape \(3, 0\)"),
    ((t(3, 4), t(4), t(4), None), ValueError, r"residual must have the shape of x, \(3, 4\), got \(4,\)"),
    ((t(3, 4), t(3, 5), t(4), None), ValueError, r"residual must have the shape of x, \(3, 4\), got \(3, 5\)"),
    ((t(3, 4), t(3, 4), t(5), None), ValueError, r"weight must be \[C\] = \[4\] .* got shape \(5,\)"),
    ((t(3, 4), t(3, 4), None, t(1, 4)), ValueError, r"bias must be \[C\] = \[4\] .* got shape \(1, 4\)"),
    ((t(3, 4), t(3, 4), t(4), None, -1.0), ValueError, "eps must be at least 0, got -1.0"),
    ((t(3, 4), t(3, 4), t(4), None, float("nan")), ValueError, "eps must be at least 0, got nan"),
    ((t(3, 4, dtype=torch.int64), t(3, 4), t(4), None), TypeError, "x must have a floating dtype, got torch.int64"),
    (
        (t(3, 4), t(3, 4, dtype=torch.bool), t(4), None),
        TypeError,
        "residual must have a floating dtype, got torch.bool",
    ),
    (([[1.0]], t(1, 1), t(1), None), TypeError, "x must be a tensor, got list"),
    ((t(3, 4), None, t(4), None), TypeError, "residual must be a tensor, got NoneType"),
    ((t(3, 4), t(3, 4), [1.0], None), TypeError, "weight must be a tensor, got list"),
    ((t(3, 4), t(3, 4).to("meta"), t(4), None), ValueError, "residual is on meta and x on"),
    ((t(3, 4), t(3, 4), t(4), t(4).to("meta")), ValueError, "bias is on meta and x on"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, 1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, -0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, float("nan")), ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, 0.1, "x"), TypeError, "seed must be an int.* got str"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, 0.1, 1.5), TypeError, "seed must be an int.* got float"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, 0.1, t(2)), ValueError, "must hold one int64, got 2 elements"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, 0.1, t(1)), ValueError, "one int64, got 1 elements of torch.float32"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, 0.1, -(2**63) - 1), ValueError, "seed must fit in 64 bits, got -92"),
    ((t(3, 4), t(3, 4), None, None, 1e-5, 0.1, t(1).to("meta")), ValueError, "seed is on meta and x on"),
]
GELU_FFN = [
    ((t(2, 0), t(4, 0), None, t(0, 4), None), ValueError, r"x must be \[\.\.\., C\] with C >= 1"),
    ((t(2, 3), t(4, 5), None, t(3, 4), None), ValueError, r"w_up must be \[F, C\] = \[F, 3\] .* got shape \(4, 5\)"),
    ((t(2, 3), t(0, 3), None, t(3, 0), None), ValueError, "w_up must be .* with F >= 1"),
    ((t(2, 3), t(4, 3), None, t(4, 3), None), ValueError, r"w_down must have shape \(3, 4\), got \(4, 3\)"),
    ((t(2, 3), t(4, 3), t(3), t(3, 4), None), ValueError, r"b_up must have shape \(4,\), got \(3,\)"),
    ((t(2, 3), t(4, 3), None, t(3, 4), t(4)), ValueError, r"b_down must have shape \(3,\), got \(4,\)"),
    ((t(2, 3), t(4, 3), None, t(3, 4), None, "swish"), ValueError, "one of gelu_tanh, gelu, relu, got 'swish'"),
    (
        (t(2, 3), t(4, 3, dtype=torch.float16), None, t(3, 4), None),
        TypeError,
        "one dtype, got x torch.float32, w_up torch.float16",
    ),
]
ATTENTION = [
    ((t(2, 3, 4), t(2, 3, 4), t(2, 3, 4)), ValueError, r"q must be \[B, H, T, D\] .* got shape \(2, 3, 4\)"),
    ((t(1, 2, 3, 0), t(1, 2, 3, 0), t(1, 2, 3, 0)), ValueError, "q must be .* with D >= 1"),
    ((t(1, 2, 3, 4), t(1, 1, 3, 4), t(1, 1, 3, 4)), ValueError, r"k must be \[B, H, S, D\] = \[1, 2, S, 4\]"),
    ((t(1, 2, 3, 4), t(1, 2, 3, 4), t(1, 2, 5, 4)), ValueError, "v must have the shape of k"),
    ((t(1, 2, 4, 4), t(1, 2, 3, 4), t(1, 2, 3, 4)), ValueError, "q has T = 4 rows and k only S = 3"),
    ((t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4), float("nan")), ValueError, "scale must be finite, got nan"),
    ((t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4), None, 1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ((t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4), None, 0.1, "x"), TypeError, "seed must be an int.* got str"),
    ((t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4), None, 0.1, t(2)), ValueError, "must hold one int64, got 2 elements"),
    ((t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4), None, 0.1, 2**63), ValueError, "seed must fit in 64 bits, got 92"),
    ((t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4), None, 0.1, t(1).to("meta")), ValueError, "seed is on meta and q on"),
    (
        (t(1, 1, 2, 4), t(1, 1, 2, 4), t(1, 1, 2, 4, dtype=torch.float16)),
        TypeError,
        "one dtype, got q torch.float32, k torch.float32, v torch.float16",
    ),
]
QKV = t(1, 2, 3, 1, 4)
PACKED = [
    ((t(1, 2, 4, 1, 4),), ValueError, r"qkv must be \[B, T, 3, H, D\] with D >= 1, got shape \(1, 2, 4, 1, 4\)"),
    ((t(1, 2, 3, 4),), ValueError, r"qkv must be \[B, T, 3, H, D\]"),
    ((t(1, 2, 3, 1, 0),), ValueError, "with D >= 1"),
    ((QKV, float("inf")), ValueError, "scale must be finite, got inf"),
    ((QKV, None, -0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ((QKV, None, 0.1, 0.5), TypeError, "seed must be an int.* got float"),
    ((3,), TypeError, "qkv must be a tensor, got int"),
]
CACHE, LENGTHS = t(2, 1, 5, 4), t(2, dtype=torch.int64)
DECODE = [
    ((t(2, 1, 0, 4), CACHE, CACHE, LENGTHS), ValueError, r"q must be \[B, H, T, D\] .* got shape \(2, 1, 0, 4\)"),
    ((t(2, 1, 1, 4), t(2, 2, 5, 4), CACHE, LENGTHS), ValueError, r"k_cache must be \[B, H, S, D\] = \[2, 1, S, 4\]"),
    ((t(2, 1, 1, 4), CACHE, t(2, 1, 6, 4), LENGTHS), ValueError, "v_cache must have the shape of k_cache"),
    ((t(2, 1, 1, 4), CACHE, CACHE, t(2)), TypeError, "lengths must be an int32 or int64 tensor, got torch.float32"),
    ((t(2, 1, 1, 4), CACHE, CACHE, 5), TypeError, "lengths must be an int32 or int64 tensor, got int"),
    ((t(2, 1, 1, 4), CACHE, CACHE, LENGTHS[:1]), ValueError, r"lengths must be \[B\] = \[2\] on .* got shape \(1,\)"),
    ((t(2, 1, 1, 4), CACHE, CACHE, LENGTHS.to("meta")), ValueError, r"lengths must be .* got shape \(2,\) on meta"),
    ((t(2, 1, 1, 4), CACHE, CACHE, LENGTHS, float("nan")), ValueError, "scale must be finite, got nan"),
    ((t(2, 1, 1, 4), CACHE, CACHE.half(), LENGTHS), TypeError, "all tensors must have one dtype"),
]
Q, SCALE = t(7, 4, dtype=torch.int8), t(7)
INT8 = [
    ((t(), Q, SCALE), ValueError, r"x must be \[\.\.\., K\] with K >= 1, got shape \(\)"),
    ((t(2, 0), Q[:, :0], SCALE), ValueError, r"x must be .* got shape \(2, 0\)"),
    ((t(2, 4, dtype=torch.int8), Q, SCALE), TypeError, "x must have a floating dtype, got torch.int8"),
    (([[1.0]], Q, SCALE), TypeError, "x must be a tensor, got list"),
    ((t(2, 4), t(7, 4), SCALE), TypeError, "weight must be an int8 tensor, got torch.float32; kernels.quantize_int8"),
    ((t(2, 4), Q.to(torch.uint8), SCALE), TypeError, "weight must be an int8 tensor, got torch.uint8"),
    ((t(2, 4), None, SCALE), TypeError, "weight must be an int8 tensor, got NoneType"),
    ((t(2, 5), Q, SCALE), ValueError, r"weight must be \[N, K\] = \[N, 5\] with N >= 1, got shape \(7, 4\)"),
    ((t(2, 4), Q[:0], SCALE[:0]), ValueError, "weight must be .* with N >= 1"),
    ((t(2, 4), Q[0], SCALE), ValueError, r"weight must be \[N, K\] .* got shape \(4,\)"),
    ((t(2, 4), Q.to("meta"), SCALE), ValueError, "weight is on meta and x on"),
    ((t(2, 4), Q, None), TypeError, "scale must be a tensor, got NoneType"),
    ((t(2, 4), Q, SCALE.half()), TypeError, "scale must be float32, got torch.float16"),
    ((t(2, 4), Q, SCALE[:6]), ValueError, r"scale must be \[N\] = \[7\], got shape \(6,\)"),
    ((t(2, 4), Q, SCALE.to("meta")), ValueError, "scale is on meta and x on"),
    ((t(2, 4), Q, SCALE, t(6)), ValueError, r"bias must be \[N\] = \[7\], got shape \(6,\)"),
    ((t(2, 4), Q, SCALE, t(7, dtype=torch.int8)), TypeError, "bias must have a floating dtype, got torch.int8"),
    ((t(2, 4).requires_grad_(), Q, SCALE), ValueError, "x requires a gradient, but int8 weights are for inference"),
    ((t(2, 4), Q, t(7).requires_grad_()), ValueError, "scale requires a gradient, but int8 weights are for inference"),
    ((t(2, 4), Q, SCALE, t(7).requires_grad_()), ValueError, "bias requires a gradient, but int8 weights"),
]
X, W, Y = t(2, 3, 4), t(7, 4), torch.ones(2, 3, dtype=torch.int64, device=DEVICE)
LOSS = [
    ((t(2, 0), t(7, 0), Y[:, 0]), ValueError, r"x must be \[\.\.\., C\] with C >= 1, got shape \(2, 0\)"),
    ((X, t(7, 5), Y), ValueError, r"weight must be \[V, C\] = \[V, 4\] with V >= 1, got shape \(7, 5\)"),
    ((X, t(0, 4), Y), ValueError, "weight must be .* with V >= 1"),
    ((X, None, Y), TypeError, "weight must be a tensor, got NoneType"),
    ((X, W.half(), Y), TypeError, "one dtype, got x torch.float32, weight torch.float16"),
    ((X, W, Y.int()), TypeError, "targets must be an int64 tensor, got torch.int32"),
    ((X, W, 3), TypeError, "targets must be an int64 tensor, got int"),
    ((X, W, Y.view(-1)), ValueError, r"targets must be \[2, 3\] on .* got shape \(6,\)"),
    ((X, W, Y.to("meta")), ValueError, r"targets must be \[2, 3\] on .* got shape \(2, 3\) on meta"),
    ((X, W, Y, 0.5), ValueError, "ignore_index must be an integer of at least -92.*, got 0.5"),
    ((X, W, Y, -1, "max"), ValueError, "reduction must be one of none, mean, sum, got 'max'"),
    ((X, W, Y, -1, "mean", 8), ValueError, "vocab_size must be at most V = 7, got 8"),
    ((X, W, Y, -1, "mean", 0), ValueError, "vocab_size must be an integer of at least 1, got 0"),
    ((X, W, Y, -1, "mean", None, 1.1), ValueError, r"label_smoothing must be in \[0, 1\], got 1.1"),
    ((X, W, Y, -1, "mean", None, 0.0, -1.0), ValueError, "z_loss must be at least 0 and finite, got -1.0"),
    ((X, W, Y, -1, "mean", None, 0.0, 0.0, 0), ValueError, "workspace_bytes must be an integer of at least 1, got 0"),
]
if DEVICE.type == "cpu":  # nobody waits for a GPU to look at its targets
    LOSS += [
        ((X, W, 7 * Y), ValueError, r"targets must be in \[0, 7\) or ignore_index = -100, got 7"),
        ((X, W, -Y), ValueError, r"targets must be in \[0, 7\) or ignore_index = -100, got -1"),
        ((X, W, 5 * Y, -1, "mean", 5), ValueError, r"targets must be in \[0, 5\) or ignore_index = -1, got 5"),
    ]
ROWS = {
    "layer_norm": LAYER_NORM,
    "add_layer_norm": ADD_LAYER_NORM,
    "gelu_ffn": GELU_FFN,
    "causal_attention": ATTENTION,
    "causal_attention_qkvpacked": PACKED,
    "decode_attention": DECODE,
    "int8_linear": INT8,
    "linear_cross_entropy": LOSS,
}
CASES = [(operator, *row) for operator, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize("namespace", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize(("operator", "arguments", "error", "message"), CASES, ids=[f"{c[0]}-{c[3]}" for c in CASES])
def test_refused_with_the_name_of_the_argument(namespace, operator, arguments, error, message):
    with pytest.raises(error, match=f"^{operator}: .*{message}"):
        getattr(namespace, operator)(*arguments)


def test_the_kernels_say_what_they_cannot_hold():
    with pytest.raises(ValueError, match="head size D must be at most 256, got 257"):
        kernels.causal_attention(*(t(1, 1, 2, 257) for _ in range(3)))
    with pytest.raises(ValueError, match="causal_attention_qkvpacked: the head size D must be at most 256, got 257"):
        kernels.causal_attention_qkvpacked(t(1, 2, 3, 1, 257))
    with pytest.raises(ValueError, match="decode_attention: the head size D must be at most 256, got 257"):
        kernels.decode_attention(t(2, 1, 1, 257), t(2, 1, 5, 257), t(2, 1, 5, 257), LENGTHS)


def test_every_operator_refuses_something():
    assert set(ROWS) == set(OPERATORS)


def test_unknown_operator():
    with pytest.raises(
        AttributeError, match="no attribute 'rms_norm'; its operators are add_layer_norm, causal_attention"
    ):
        kernels.rms_norm  # noqa: B018
