"""The table of operators under test. One entry generates all tests of `test_operators.py` for an operator."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels import reference, runtime
from kernels.tuning import Config
from tests.support.cases import OPERATORS, Case, Dropout, Operator, Shape, matrix
from tests.support.oracle import DEVICE


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def register(operator: Operator) -> None:
    OPERATORS[operator.name] = operator


_rows = st.lists(st.sampled_from([2, 3, 5, 8, 9, 1, 0]), max_size=3)
_flag = st.booleans()
_dropouts = st.sampled_from([{}, {}, {"dropout_p": 0.3, "seed": 5}])
_INVALID_DROPOUT = (
    ({"dropout_p": 1.0}, ValueError, "1.0"),
    ({"dropout_p": -0.1}, ValueError, "-0.1"),
    ({"dropout_p": float("nan")}, ValueError, "nan"),
    ({"seed": "x", "dropout_p": 0.1}, TypeError, "str"),
    ({"seed": 1.5, "dropout_p": 0.1}, TypeError, "float"),
    ({"seed": t(2, dtype=torch.int64), "dropout_p": 0.1}, ValueError, "2 elements"),
    ({"seed": t(1), "dropout_p": 0.1}, ValueError, "torch.float32"),
    ({"seed": 2**63, "dropout_p": 0.1}, ValueError, str(2**63)),
    ({"seed": -(2**63) - 1, "dropout_p": 0.1}, ValueError, str(-(2**63) - 1)),
    ({"seed": t(1).to("meta"), "dropout_p": 0.1}, ValueError, "meta"),
)

_CHUNKS = {"BM": 1, "BN": 16, "num_warps": 4}  # short ones, so that short rows have many
_PARAMETERS = {"BM": 4, "BN": 16, "num_warps": 4, "sums": 2}
_WHOLE_ROWS = {"BM": 2, "BN": 64, "num_warps": 4, "per_processor": 2}
_CHUNKED_BACKWARD = {"layer_norm_backward": _CHUNKS, "layer_norm_parameters": _PARAMETERS}
_NORM_CONFIGURATIONS = {
    "chunks": {"layer_norm_forward": _CHUNKS, **_CHUNKED_BACKWARD},
    "chunks in the backward alone": _CHUNKED_BACKWARD,
    "few programs": {"layer_norm_backward": _WHOLE_ROWS},
}
_INVALID_NORM = (
    ({"x": t(3, 4, dtype=torch.int64)}, TypeError, "torch.int64"), ({"weight": t(5)}, ValueError, "(5,)"),
    ({"weight": [1.0]}, TypeError, "list"), ({"weight": t(4).to("meta")}, ValueError, "meta"),
    ({"bias": t(3)}, ValueError, "(3,)"), ({"bias": t(1, 4)}, ValueError, "(1, 4)"),
    ({"bias": t(4).to("meta")}, ValueError, "meta"), ({"eps": -1.0}, ValueError, "-1.0"),
    ({"eps": float("nan")}, ValueError, "nan"), ({"dtype": torch.int32}, TypeError, "torch.int32"),
)  # fmt: skip
# more rows than the programs of the backward take at once, 32 each at this width
_MANY_ROWS = 32 * runtime.program_count(DEVICE, per_processor=8) + 5


def layer_norm(*rows: int, width: int, weight: bool = True, bias: bool = True, in_float32=(), **options: Any) -> Case:
    shapes = {"x": (*rows, width), "weight": (width,) if weight else None, "bias": (width,) if bias else None}
    return Case("layer_norm", shapes, options, in_float32)


register(Operator(
    "layer_norm",
    batched=("x",),
    cases=(
        layer_norm(1, width=1), layer_norm(37, width=33), layer_norm(11, width=97, weight=False),
        layer_norm(3, 5, width=768, eps=1e-3), layer_norm(130, width=64, bias=False),
        layer_norm(5, width=48, weight=False, bias=False),
        layer_norm(7, width=33, in_float32=("weight", "bias")),
        layer_norm(7, width=33, in_float32=("weight", "bias"), dtype=torch.bfloat16),
        layer_norm(7, width=33, dtype=torch.float32),
        layer_norm(3, width=8209, in_float32=("x", "weight", "bias"), dtype=torch.float16),
        layer_norm(width=19), layer_norm(2, width=4099), layer_norm(3, width=8209),
        layer_norm(3, width=8209, weight=False), layer_norm(35, width=8200, bias=False), layer_norm(2, width=16411),
        layer_norm(2, width=16384), layer_norm(_MANY_ROWS, width=64), layer_norm(0, width=16),
        layer_norm(0, width=8200), layer_norm(0, width=16400),
    ),
    small=(
        layer_norm(2, 7, width=33), layer_norm(2, 7, width=33, weight=False),
        layer_norm(2, 7, width=33, dtype=torch.bfloat16),
    ),
    drawn=st.builds(
        lambda rows, width, weight, bias: layer_norm(*rows, width=width, weight=weight, bias=bias, eps=1.0),
        _rows, st.integers(1, 70), _flag, _flag,
    ),
    large=(
        layer_norm(8, 1024, width=768), layer_norm(8, 1024, width=1600, bias=False), layer_norm(300, width=8192),
        layer_norm(300, width=16384), layer_norm(300, width=50257),
    ),
    far=(layer_norm(2**21 + 8, width=1024), layer_norm(2**16 + 8, width=2**15 + 8)),
    configurations=_NORM_CONFIGURATIONS,
    valid={"x": t(3, 4), "weight": t(4), "bias": None},
    invalid=(
        ({"x": t(), "weight": t(1)}, ValueError, "()"), ({"x": t(3, 0), "weight": t(0)}, ValueError, "(3, 0)"),
        ({"x": [[1.0]], "weight": t(1)}, TypeError, "list"), *_INVALID_NORM,
    ),
))  # fmt: skip


def add_layer_norm(
    *rows: int, width: int, weight: bool = True, bias: bool = True, in_float32=(), in_half=(), **options: Any
) -> Case:
    shapes = layer_norm(*rows, width=width, weight=weight, bias=bias).shapes | {"residual": (*rows, width)}
    return Case("add_layer_norm", shapes, options, in_float32, in_half)


def _added_mask(case: Case) -> Tensor:
    """Read the mask off a dropout of ones that are added to zeros."""
    ones = torch.ones(case.shapes["x"], device=DEVICE)
    options = {name: case.options[name] for name in ("dropout_p", "seed")}
    return kernels.add_layer_norm(ones, torch.zeros_like(ones), None, None, **options)[1] != 0


register(Operator(
    "add_layer_norm",
    batched=("x", "residual"),
    cases=(
        add_layer_norm(1, width=1), add_layer_norm(37, width=33), add_layer_norm(11, width=97, weight=False),
        add_layer_norm(3, 5, width=768, eps=1e-3), add_layer_norm(3, 5, width=768, dropout_p=0.1, seed=3),
        add_layer_norm(130, width=64, bias=False), add_layer_norm(5, width=48, weight=False, bias=False),
        add_layer_norm(37, width=33, dropout_p=0.3, seed=5),
        add_layer_norm(37, width=33, dropout_p=0.9, seed=2**40 + 1, bias=False),
        add_layer_norm(7, width=33, in_float32=("residual",)), add_layer_norm(7, width=33, in_half=("residual",)),
        add_layer_norm(7, width=33, in_float32=("residual", "weight", "bias"), dtype=torch.bfloat16),
        add_layer_norm(7, width=33, in_float32=("weight", "bias"), dtype=torch.bfloat16, dropout_p=0.3, seed=5),
        add_layer_norm(3, width=8209, in_float32=("residual",), dtype=torch.float16),
        add_layer_norm(7, width=33, in_float32=("residual", "weight", "bias"), dropout_p=0.3, seed=5),
        add_layer_norm(7, width=33, in_half=("residual",), dropout_p=0.3, seed=5),
        add_layer_norm(3, width=8209, in_float32=("residual",)),
        add_layer_norm(width=19), add_layer_norm(2, width=4099), add_layer_norm(3, width=8209),
        add_layer_norm(3, width=4100, weight=False, dropout_p=0.3, seed=5),
        add_layer_norm(2, width=16411), add_layer_norm(2, width=16411, bias=False, dropout_p=0.3, seed=5),
        add_layer_norm(_MANY_ROWS, width=64), add_layer_norm(0, width=16),
        add_layer_norm(0, width=16, dropout_p=0.3, seed=5), add_layer_norm(0, width=8200),
    ),
    small=(
        add_layer_norm(2, 7, width=33),
        add_layer_norm(2, 7, width=33, weight=False, in_float32=("residual",)),
        add_layer_norm(2, 7, width=33, bias=False, dropout_p=0.3, seed=5),
        add_layer_norm(2, 7, width=33, in_float32=("residual",), dtype=torch.bfloat16),
    ),
    drawn=st.builds(
        lambda rows, width, weight, bias, residual, options: add_layer_norm(
            *rows, width=width, weight=weight, bias=bias, in_float32=residual, eps=1.0, **options
        ),
        _rows, st.integers(1, 70), _flag, _flag, st.sampled_from([(), ("residual",)]), _dropouts,
    ),
    large=(
        add_layer_norm(8, 1024, width=768), add_layer_norm(8, 1024, width=768, dropout_p=0.1, seed=3),
        add_layer_norm(8, 1024, width=1600, in_float32=("residual",)),
        add_layer_norm(300, width=8192, dropout_p=0.1, seed=3), add_layer_norm(300, width=16384),
        add_layer_norm(300, width=50257, dropout_p=0.1, seed=3),
    ),
    far=(add_layer_norm(2**21 + 8, width=1024), add_layer_norm(2**16 + 8, width=2**15 + 8)),
    configurations=_NORM_CONFIGURATIONS,
    valid={"x": t(3, 4), "residual": t(3, 4), "weight": t(4), "bias": None},
    invalid=(
        ({"x": t(), "residual": t(), "weight": t(1)}, ValueError, "()"),
        ({"x": t(3, 0), "residual": t(3, 0), "weight": t(0)}, ValueError, "(3, 0)"),
        ({"x": [[1.0]], "residual": t(1, 1), "weight": t(1)}, TypeError, "list"),
        ({"residual": t(4)}, ValueError, "(4,)"), ({"residual": t(3, 5)}, ValueError, "(3, 5)"),
        ({"residual": None}, TypeError, "NoneType"), ({"residual": t(3, 4).to("meta")}, ValueError, "meta"),
        ({"residual": t(3, 4, dtype=torch.bool)}, TypeError, "torch.bool"),
        *_INVALID_NORM, *_INVALID_DROPOUT,
    ),
    results=("y", "h"),
    dropout=Dropout(
        mask=_added_mask,
        candidates=lambda case: torch.ones(case.shapes["x"], dtype=torch.bool, device=DEVICE),
        reference=lambda eps=1e-5, **arguments: reference.add_layer_norm_with_mask(eps=eps, **arguments),
    ),
))  # fmt: skip


def gelu_ffn(*rows: int, width: int, hidden: int, biases: bool = True, **options: Any) -> Case:
    shapes = {
        "x": (*rows, width),
        "w_up": (hidden, width),
        "b_up": (hidden,) if biases else None,
        "w_down": (width, hidden),
        "b_down": (width,) if biases else None,
    }
    return Case("gelu_ffn", shapes, options)


def _ffn_blocks(**blocks: int) -> dict[str, Config]:
    others = {"implementation": "fused", "DESCRIPTORS": False, "per_processor": 1, "num_warps": 4, "num_stages": 2}
    return {name: {**others, **blocks} for name in ("ffn_up", "ffn_down_backward")}


register(Operator(
    "gelu_ffn",
    batched=("x",),
    cases=(
        *(
            gelu_ffn(*rows, width=width, hidden=hidden, implementation=implementation, **options)
            for implementation in ("fused", "unfused")
            for rows, width, hidden, options in (
                ((1,), 1, 1, {}), ((37,), 33, 65, {}), ((37,), 33, 65, {"activation": "gelu"}),
                ((2, 19), 16, 48, {"activation": "relu"}), ((11,), 97, 101, {}),
                ((200,), 80, 144, {"biases": False}), ((70,), 768, 130, {}), ((), 19, 7, {}), ((0,), 16, 32, {}),
                # long sums: over C in the first product, over the rows in the weights' gradients
                ((3,), 16_384, 24, {}),
                ((16_384,), 8, 24, {}),
            )
        ),
        # rows aligned for TMA, and more tiles than programs
        gelu_ffn(300, width=72, hidden=520, implementation="fused"),
        gelu_ffn(129, width=136, hidden=264, activation="gelu", biases=False, implementation="fused"),
        gelu_ffn(130, width=2056, hidden=264, activation="relu", implementation="fused"),
        gelu_ffn(5, width=33, hidden=65),
    ),
    small=(
        gelu_ffn(2, 7, width=33, hidden=65, implementation="fused"),
        gelu_ffn(2, 7, width=32, hidden=64, biases=False, implementation="fused"),
        gelu_ffn(2, 7, width=33, hidden=65, implementation="unfused"),
        gelu_ffn(2, 7, width=32, hidden=64, activation="gelu"),
    ),
    drawn=st.builds(
        lambda rows, width, hidden, biases, implementation: gelu_ffn(
            *rows, width=width, hidden=hidden, biases=biases, implementation=implementation
        ),
        _rows, st.integers(1, 70), st.integers(1, 70), _flag, st.sampled_from(["fused", "unfused"]),
    ),
    large=tuple(
        gelu_ffn(*rows, width=width, hidden=hidden, implementation=implementation, **options)
        for implementation in ("fused", "unfused")
        for rows, width, hidden, options in (
            ((8, 512), 768, 3072, {}), ((8, 512), 768, 3072, {"activation": "gelu"}),
            ((1000,), 1600, 6400, {"biases": False}), ((1000,), 397, 1001, {"activation": "relu"}),
            ((200,), 16_384, 512, {}), ((64,), 1024, 16_384, {}), ((1,), 768, 3072, {}),
        )
    ),
    far=tuple(
        gelu_ffn(2**21 + 8, width=width, hidden=hidden, implementation=implementation)
        for width, hidden in ((1024, 64), (64, 1024))
        for implementation in ("fused", "unfused")
    ),
    configurations={
        "small blocks, one group": _ffn_blocks(BM=16, BN=32, BK=16, GROUP=1, PARTS=1),
        "wide blocks in halves": _ffn_blocks(BM=32, BN=128, BK=32, GROUP=3, PARTS=2),
    },
    valid={"x": t(2, 3), "w_up": t(4, 3), "b_up": None, "w_down": t(3, 4), "b_down": None},
    invalid=(
        ({"x": t(2, 0), "w_up": t(4, 0), "w_down": t(0, 4)}, ValueError, "(2, 0)"),
        ({"w_up": t(4, 5)}, ValueError, "(4, 5)"), ({"w_up": t(0, 3), "w_down": t(3, 0)}, ValueError, "(0, 3)"),
        ({"w_up": t(4, 3, dtype=torch.float16)}, TypeError, "torch.float16"),
        ({"w_down": t(4, 3)}, ValueError, "(4, 3)"), ({"b_up": t(3)}, ValueError, "(3,)"),
        ({"b_down": t(4)}, ValueError, "(4,)"), ({"activation": "swish"}, ValueError, "'swish'"),
        ({"implementation": "fast"}, ValueError, "'fast'"),
    ),
    intermediate=lambda case: math.prod(case.shapes["x"][:-1]) * case.shapes["w_up"][0],
    draws={"w_up": matrix, "w_down": matrix},
))  # fmt: skip


def attention(batch: int, heads: int, queries: int, keys: int, head_size: int, **options: Any) -> Case:
    key_shape = (batch, heads, keys, head_size)
    return Case("causal_attention", {"q": (batch, heads, queries, head_size), "k": key_shape, "v": key_shape}, options)


def _attention_blocks(block_m: int, block_n: int) -> dict[str, Config]:
    blocks = {"DESCRIPTORS": False, "BM": block_m, "BN": block_n, "num_warps": 4, "num_stages": 1}
    return {f"attention_{name}": blocks for name in ("forward", "dk_dv", "dq")}


def _attention_mask(case: Case) -> Tensor:
    """Read the mask off the probabilities: scores are equal and v is the identity matrix."""
    batch, heads, queries, _ = case.shapes["q"]
    keys = case.shapes["k"][2]
    q, k = (torch.zeros(batch, heads, length, keys, device=DEVICE) for length in (queries, keys))
    options = {name: case.options[name] for name in ("dropout_p", "seed")}
    identity = torch.eye(keys, device=DEVICE).expand(batch, heads, keys, keys)
    return kernels.causal_attention(q, k, identity, **options) != 0


def _attention_cancelling(inputs: dict[str, Any], upstream: dict[str, Tensor]) -> float:
    """Bound on |dp k| where a query sees one key: its probability is 1, and dp - delta cancels to a gradient of 0."""
    q, k, v = (inputs[name].abs().double() for name in "qkv")
    if k.shape[2] != 1 or not upstream or q.numel() == 0:
        return 0.0
    dp = (upstream["result"].abs().double() * v).sum(-1).max()
    return float(dp * torch.maximum(q.max(), k.max())) * q.shape[-1] ** -0.5


def _attention_candidates(case: Case) -> Tensor:
    batch, heads, queries, _ = case.shapes["q"]
    keys = case.shapes["k"][2]
    return reference.causal_mask(queries, keys, DEVICE).expand(batch, heads, queries, keys)


register(Operator(
    "causal_attention",
    batched=("q", "k", "v"),
    cases=(
        attention(1, 1, 1, 1, 16), attention(2, 3, 77, 77, 20), attention(1, 2, 128, 128, 64),
        attention(1, 2, 129, 129, 64, scale=0.3), attention(1, 1, 1, 40, 32), attention(2, 2, 33, 131, 8),
        attention(1, 1, 70, 70, 128), attention(1, 1, 40, 45, 256), attention(1, 2, 9, 9, 1),
        attention(1, 2, 97, 97, 31),
        attention(2, 2, 80, 80, 16, dropout_p=0.3, seed=5),
        attention(1, 2, 33, 61, 20, dropout_p=0.5, seed=2**40 + 1, scale=0.3),
        attention(0, 2, 8, 8, 16), attention(1, 1, 0, 5, 16),
    ),
    small=(attention(2, 3, 17, 21, 20), attention(2, 1, 17, 17, 20, dropout_p=0.3, seed=5)),
    drawn=st.builds(
        lambda batch, heads, queries, more, head_size, options: attention(
            batch, heads, queries, queries + more, head_size, **options
        ),
        st.integers(0, 2), st.integers(1, 2), st.integers(0, 40), st.integers(1, 30), st.integers(1, 40), _dropouts,
    ),
    large=(
        attention(2, 4, 1024, 1024, 64), attention(2, 4, 1000, 1024, 96), attention(2, 4, 512, 777, 128),
        attention(1, 2, 700, 700, 256),
        attention(2, 4, 256, 256, 64, dropout_p=0.1, seed=3),
        attention(1, 1, 2048, 131_072, 64),
        # more heads than a grid's second dimension has room for; PyTorch's grids have two for batch and heads
        attention(300, 220, 3, 3, 16),
    ),
    far=(attention(1032, 32, 1024, 1024, 64),),
    configurations={
        "square blocks": _attention_blocks(16, 16),
        "more queries than keys": _attention_blocks(32, 16),
        "more keys than queries": _attention_blocks(16, 32),
    },
    valid=dict.fromkeys("qkv", t(1, 2, 3, 4)),
    invalid=(
        (dict.fromkeys("qkv", t(2, 3, 4)), ValueError, "(2, 3, 4)"),
        (dict.fromkeys("qkv", t(1, 2, 3, 0)), ValueError, "(1, 2, 3, 0)"),
        (dict.fromkeys("kv", t(1, 1, 3, 4)), ValueError, "(1, 1, 3, 4)"),
        (dict.fromkeys("kv", t(1, 2, 2, 4)), ValueError, "S = 2"), ({"v": t(1, 2, 5, 4)}, ValueError, "(1, 2, 5, 4)"),
        ({"v": t(1, 2, 3, 4, dtype=torch.float16)}, TypeError, "torch.float16"),
        ({"scale": float("nan")}, ValueError, "nan"),
        *_INVALID_DROPOUT,
    ),
    dropout=Dropout(
        mask=_attention_mask,
        candidates=_attention_candidates,
        reference=lambda scale=None, **arguments: reference.attention_with_mask(scale=scale, **arguments),
    ),
    cancelling=_attention_cancelling,
))  # fmt: skip


def packed(batch: int, length: int, heads: int, head_size: int, **options: Any) -> Case:
    return Case("causal_attention_qkvpacked", {"qkv": (batch, length, 3, heads, head_size)}, options)


def _unpacked(case: Case) -> Case:
    batch, length, _, heads, head_size = case.shapes["qkv"]
    return attention(batch, heads, length, length, head_size, **case.options)


def _packed_with_mask(qkv: Tensor, dropout_p: float, kept: Tensor, scale: float | None = None) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return reference.attention_with_mask(q, k, v, scale, dropout_p, kept).transpose(1, 2).contiguous()


register(Operator(
    "causal_attention_qkvpacked",
    batched=("qkv",),
    cases=(
        packed(1, 1, 1, 16), packed(2, 77, 3, 20), packed(1, 129, 2, 64, scale=0.3), packed(1, 70, 1, 128),
        packed(1, 40, 2, 80), packed(1, 33, 1, 256), packed(2, 80, 2, 16, dropout_p=0.3, seed=5), packed(0, 8, 2, 16),
        packed(1, 0, 2, 16),
    ),
    small=(packed(2, 17, 3, 20), packed(2, 17, 1, 24, dropout_p=0.3, seed=5)),
    drawn=st.builds(
        lambda batch, length, heads, head_size, options: packed(batch, length, heads, head_size, **options),
        st.integers(0, 2), st.integers(0, 40), st.integers(1, 2), st.integers(1, 40), _dropouts,
    ),
    large=(packed(2, 1024, 4, 64), packed(2, 1000, 4, 96), packed(1, 512, 3, 128, dropout_p=0.1, seed=3)),
    far=(packed(1032, 1024, 12, 64),),
    configurations={"square blocks": _attention_blocks(16, 16)},
    valid={"qkv": t(1, 2, 3, 1, 4)},
    invalid=(
        ({"qkv": t(1, 2, 4, 1, 4)}, ValueError, "(1, 2, 4, 1, 4)"),
        ({"qkv": t(1, 2, 3, 4)}, ValueError, "(1, 2, 3, 4)"),
        ({"qkv": t(1, 2, 3, 1, 0)}, ValueError, "(1, 2, 3, 1, 0)"), ({"qkv": 3}, TypeError, "int"),
        ({"scale": float("inf")}, ValueError, "inf"),
        *_INVALID_DROPOUT,
    ),
    result_shape=lambda case: (*case.shapes["qkv"][:2], *case.shapes["qkv"][3:]),
    dropout=Dropout(
        mask=lambda case: _attention_mask(_unpacked(case)),
        candidates=lambda case: _attention_candidates(_unpacked(case)),
        reference=_packed_with_mask,
    ),
))  # fmt: skip


def decode(batch: int, heads: int, keys: int, head_size: int, queries: int = 1, **options: Any) -> Case:
    cache = (batch, heads, keys, head_size)
    shapes = {"q": (batch, heads, queries, head_size), "k_cache": cache, "v_cache": cache, "lengths": (batch,)}
    return Case("decode_attention", shapes, options)


def _lengths(case: Case, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(0, case.shapes["k_cache"][2] + 1, shape, generator=generator)


register(Operator(
    "decode_attention",
    batched=("q", "k_cache", "v_cache", "lengths"),
    cases=(
        decode(1, 1, 1, 16), decode(5, 3, 77, 20), decode(2, 2, 300, 64, scale=0.3), decode(1, 1, 1100, 31),
        decode(3, 1, 65, 128), decode(1, 2, 40, 256), decode(0, 2, 8, 16), decode(5, 3, 77, 20, queries=4),
        decode(1, 2, 1100, 31, queries=9, scale=0.3),
        decode(4, 1, 3, 16, queries=5),
    ),
    small=(decode(3, 2, 41, 20), decode(1, 1, 600, 16), decode(2, 2, 60, 24, queries=3)),
    drawn=st.builds(
        lambda batch, heads, keys, head_size, queries: decode(batch, heads, keys, head_size, queries),
        st.integers(0, 3), st.integers(1, 2), st.integers(1, 70), st.integers(1, 40), st.integers(1, 6),
    ),
    large=(
        decode(1, 12, 32_768, 64), decode(64, 12, 1024, 64), decode(512, 4, 100, 128), decode(2, 3, 131_072, 80),
        decode(300, 220, 5, 16), decode(64, 12, 1024, 64, queries=5),
    ),
    far=(decode(2112, 16, 1024, 64),),
    configurations={
        "parts of a few keys": {"decode": {"BN": 16, "num_warps": 4, "per_processor": 64, "shortest": 16}},
        "one part": {"decode": {"BN": 32, "num_warps": 4, "per_processor": 1, "shortest": 2**20}},
    },
    valid={"q": t(2, 1, 1, 4), "k_cache": t(2, 1, 5, 4), "v_cache": t(2, 1, 5, 4), "lengths": t(2, dtype=torch.int64)},
    invalid=(
        ({"q": t(2, 1, 0, 4)}, ValueError, "(2, 1, 0, 4)"), ({"k_cache": t(2, 2, 5, 4)}, ValueError, "(2, 2, 5, 4)"),
        ({"v_cache": t(2, 1, 6, 4)}, ValueError, "(2, 1, 6, 4)"),
        ({"v_cache": t(2, 1, 5, 4, dtype=torch.float16)}, TypeError, "torch.float16"),
        ({"lengths": t(2)}, TypeError, "torch.float32"), ({"lengths": 5}, TypeError, "int"),
        ({"lengths": t(1, dtype=torch.int64)}, ValueError, "(1,)"),
        ({"lengths": t(2, dtype=torch.int64).to("meta")}, ValueError, "meta"),
        ({"scale": float("nan")}, ValueError, "nan"),
    ),
    differentiable=False,
    draws={"lengths": _lengths},
))  # fmt: skip


def int8_linear(*rows: int, width: int, outputs: int, bias: bool = True, in_float32=(), in_half=()) -> Case:
    shapes = {
        "x": (*rows, width),
        "weight": (outputs, width),
        "scale": (outputs,),
        "bias": (outputs,) if bias else None,
    }
    return Case("int8_linear", shapes, {}, in_float32, in_half)


def _int8_weight(case: Case, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def _int8_scale(case: Case, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 scales with which y is about as large as x."""
    return 0.01 * case.shapes["weight"][1] ** -0.5 * (0.5 + torch.rand(shape, generator=generator))


register(Operator(
    "int8_linear",
    batched=("x",),
    cases=(
        int8_linear(1, width=1, outputs=1), int8_linear(1, width=97, outputs=37),
        int8_linear(1, width=5000, outputs=3, bias=False),  # longer than what is read at once
        *(int8_linear(rows, width=33, outputs=101) for rows in range(1, 21)),
        int8_linear(16, width=1040, outputs=130, bias=False),
        int8_linear(3, 1, width=1040, outputs=130), int8_linear(33, width=272, outputs=70),
        int8_linear(64, width=97, outputs=70),
        int8_linear(65, width=97, outputs=37),  # PyTorch's product from here on
        int8_linear(2, 50, width=48, outputs=24, bias=False),
        int8_linear(1, width=768, outputs=300, in_float32=("bias",)),
        int8_linear(5, width=48, outputs=37, in_float32=("bias",)),
        int8_linear(70, width=48, outputs=37, in_half=("bias",)),
        int8_linear(width=19, outputs=7), int8_linear(0, width=16, outputs=8), int8_linear(3, 0, width=16, outputs=8),
    ),
    small=(
        int8_linear(1, 1, width=48, outputs=37), int8_linear(2, 7, width=33, outputs=50),
        int8_linear(2, 35, width=32, outputs=50, bias=False),
    ),
    drawn=st.builds(
        lambda rows, width, outputs, bias: int8_linear(*rows, width=width, outputs=outputs, bias=bias),
        _rows, st.integers(1, 70), st.integers(1, 70), _flag,
    ),
    large=tuple(
        int8_linear(rows, width=width, outputs=outputs)
        for rows in (1, 3, 16, 32, 64, 100)
        for width, outputs in (
            (768, 768), (768, 2304), (768, 3072), (3072, 768), (768, 50257), (1600, 6400), (6400, 1600), (797, 1001)
        )
    ),
    # weights, read one row at a time and by tiles, and rows
    far=(
        int8_linear(8, width=2**15 + 16, outputs=2**16 + 8),
        int8_linear(2**21 + 8, width=1024, outputs=64),
    ),
    configurations={
        "a few weights at a time": {
            "int8_row": {"BN": 8, "BK": 16, "num_warps": 4},
            "int8_rows": {"BM": 16, "BN": 16, "BK": 16, "num_warps": 4, "num_stages": 2},
        },
    },
    valid={"x": t(2, 4), "weight": t(7, 4, dtype=torch.int8), "scale": t(7)},
    invalid=(
        ({"x": t()}, ValueError, "()"), ({"x": t(2, 0), "weight": t(7, 0, dtype=torch.int8)}, ValueError, "(2, 0)"),
        ({"x": t(2, 4, dtype=torch.int8)}, TypeError, "torch.int8"), ({"x": [[1.0]]}, TypeError, "list"),
        ({"weight": t(7, 4)}, TypeError, "torch.float32"),
        ({"weight": t(7, 4, dtype=torch.uint8)}, TypeError, "torch.uint8"), ({"weight": None}, TypeError, "NoneType"),
        ({"weight": t(7, 4, dtype=torch.int8), "x": t(2, 5)}, ValueError, "(7, 4)"),
        ({"weight": t(0, 4, dtype=torch.int8), "scale": t(0)}, ValueError, "(0, 4)"),
        ({"weight": t(4, dtype=torch.int8)}, ValueError, "(4,)"),
        ({"weight": t(7, 4, dtype=torch.int8).to("meta")}, ValueError, "meta"),
        ({"scale": None}, TypeError, "NoneType"), ({"scale": t(7, dtype=torch.float16)}, TypeError, "torch.float16"),
        ({"scale": t(6)}, ValueError, "(6,)"), ({"scale": t(7).to("meta")}, ValueError, "meta"),
        ({"bias": t(6)}, ValueError, "(6,)"), ({"bias": t(7, dtype=torch.int8)}, TypeError, "torch.int8"),
        ({"x": t(2, 4).requires_grad_()}, ValueError, "requires a gradient"),
        ({"scale": t(7).requires_grad_()}, ValueError, "requires a gradient"),
        ({"bias": t(7).requires_grad_()}, ValueError, "requires a gradient"),
    ),
    result_shape=lambda case: (*case.shapes["x"][:-1], case.shapes["weight"][0]),
    differentiable=False,
    draws={"weight": _int8_weight, "scale": _int8_scale},
))  # fmt: skip


def linear_cross_entropy(*rows: int, width: int, classes: int, **options: Any) -> Case:
    shapes = {"x": (*rows, width), "weight": (classes, width), "targets": rows}
    return Case("linear_cross_entropy", shapes, options)


def _targets(case: Case, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw classes, and `ignore_index` for about one in five rows."""
    classes = case.options.get("vocab_size") or case.shapes["weight"][0]
    targets = torch.randint(0, classes, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 0.2
    return targets.masked_fill(ignored, case.options.get("ignore_index", -100))


_CHUNKED = {"workspace_bytes": 2000}  # chunks of a few rows

register(Operator(
    "linear_cross_entropy",
    batched=("x", "targets"),
    cases=(
        linear_cross_entropy(1, width=1, classes=1),
        *(linear_cross_entropy(37, width=33, classes=101, reduction=r) for r in ("mean", "sum", "none")),
        linear_cross_entropy(3, 5, width=64, classes=5000, reduction="none"),
        linear_cross_entropy(3, 5, width=64, classes=9000, vocab_size=8193),
        linear_cross_entropy(300, width=16, classes=70, workspace_bytes=160 * 128 * 4),
        linear_cross_entropy(20, width=33, classes=101, label_smoothing=0.1),
        linear_cross_entropy(20, width=33, classes=101, z_loss=1e-2, reduction="sum"),
        linear_cross_entropy(
            20, width=33, classes=128, z_loss=1e-2, label_smoothing=0.3, vocab_size=90, **_CHUNKED
        ),
        linear_cross_entropy(
            20, width=33, classes=128, z_loss=1e-2, label_smoothing=1.0, vocab_size=90, reduction="none"
        ),
        linear_cross_entropy(20, width=33, classes=101, ignore_index=7),
        linear_cross_entropy(20, width=33, classes=101, ignore_index=-1, reduction="none"),
        linear_cross_entropy(width=19, classes=30),
        *(linear_cross_entropy(0, width=16, classes=30, reduction=reduction) for reduction in ("sum", "none")),
    ),
    small=(
        linear_cross_entropy(2, 7, width=33, classes=50),
        linear_cross_entropy(2, 7, width=33, classes=50, reduction="none", vocab_size=41, **_CHUNKED),
        linear_cross_entropy(
            2, 7, width=33, classes=50, reduction="sum", label_smoothing=0.1, z_loss=1e-2, **_CHUNKED
        ),
    ),
    drawn=st.builds(
        lambda rows, width, classes, padding, options: linear_cross_entropy(
            *rows, width=width, classes=classes + padding, vocab_size=classes, **options
        ),
        _rows, st.integers(1, 40), st.integers(1, 70), st.integers(0, 9),
        st.builds(
            lambda reduction, others, workspace: {"reduction": reduction, **others, **workspace},
            st.sampled_from(["sum", "none"]),
            st.sampled_from([{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}]),
            st.sampled_from([{}, _CHUNKED]),
        ),
    ),
    large=(
        linear_cross_entropy(8, 1024, width=768, classes=50304, vocab_size=50257),
        linear_cross_entropy(1000, width=768, classes=50257, reduction="none"),
        linear_cross_entropy(1000, width=1600, classes=50257, label_smoothing=0.1, z_loss=1e-4),
        linear_cross_entropy(300, width=64, classes=262_144),
    ),
    far=(linear_cross_entropy(43_008, width=64, classes=50304, reduction="none", workspace_bytes=2**34),),
    configurations={"short blocks": {"cross_entropy": {"BLOCK": 16, "num_warps": 1}}},
    valid={"x": t(2, 3, 4), "weight": t(7, 4), "targets": t(2, 3, dtype=torch.int64)},
    invalid=(
        ({"x": t(2, 0), "weight": t(7, 0), "targets": t(2, dtype=torch.int64)}, ValueError, "(2, 0)"),
        ({"weight": t(7, 5)}, ValueError, "(7, 5)"), ({"weight": t(0, 4)}, ValueError, "(0, 4)"),
        ({"weight": None}, TypeError, "NoneType"),
        ({"weight": t(7, 4, dtype=torch.float16)}, TypeError, "torch.float16"),
        ({"targets": t(2, 3, dtype=torch.int32)}, TypeError, "torch.int32"), ({"targets": 3}, TypeError, "int"),
        ({"targets": t(6, dtype=torch.int64)}, ValueError, "(6,)"),
        ({"targets": t(2, 3, dtype=torch.int64).to("meta")}, ValueError, "meta"),
        ({"ignore_index": 0.5}, ValueError, "0.5"), ({"reduction": "max"}, ValueError, "'max'"),
        ({"vocab_size": 8}, ValueError, "8"), ({"vocab_size": 0}, ValueError, "0"),
        ({"label_smoothing": 1.1}, ValueError, "1.1"), ({"z_loss": -1.0}, ValueError, "-1.0"),
        ({"workspace_bytes": 0}, ValueError, "0"),
        # checking targets on a GPU would synchronise
        *(
            ({"targets": torch.full((2, 3), target), **options}, ValueError, str(target))
            for target, options in ((7, {}), (-1, {}), (5, {"ignore_index": -1, "vocab_size": 5}))
            if DEVICE.type == "cpu"
        ),
    ),
    result_shape=lambda case: case.shapes["targets"] if case.options.get("reduction") == "none" else (),
    intermediate=lambda case: math.prod(case.shapes["x"][:-1]) * case.shapes["weight"][0],
    draws={"weight": matrix, "targets": _targets},
))  # fmt: skip


CASES = [case for operator in OPERATORS.values() for case in operator.cases]
SMALL = [case for operator in OPERATORS.values() for case in operator.small]
DIFFERENTIABLE = [case for case in SMALL if case.row.differentiable]
DROPOUT = [case for case in SMALL if case.has_dropout]
