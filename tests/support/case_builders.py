"""Cases of the operators by their sizes: the shapes of all arguments, and options."""

from __future__ import annotations

from typing import Any

from tests.support.cases import Case


def layer_norm(*rows: int, width: int, weight: bool = True, bias: bool = True, in_float32=(), **options: Any) -> Case:
    shapes = {"x": (*rows, width), "weight": (width,) if weight else None, "bias": (width,) if bias else None}
    return Case("layer_norm", shapes, options, in_float32)


def add_layer_norm(
    *rows: int, width: int, weight: bool = True, bias: bool = True, in_float32=(), in_half=(), **options: Any
) -> Case:
    shapes = {
        "x": (*rows, width),
        "residual": (*rows, width),
        "weight": (width,) if weight else None,
        "bias": (width,) if bias else None,
    }
    return Case("add_layer_norm", shapes, options, in_float32, in_half)


def gelu_ffn(*rows: int, width: int, hidden: int, biases: bool = True, **options: Any) -> Case:
    shapes = {
        "x": (*rows, width),
        "w_up": (hidden, width),
        "b_up": (hidden,) if biases else None,
        "w_down": (width, hidden),
        "b_down": (width,) if biases else None,
    }
    return Case("gelu_ffn", shapes, options)


def attention(batch: int, heads: int, queries: int, keys: int, head_size: int, **options: Any) -> Case:
    key_shape = (batch, heads, keys, head_size)
    return Case("causal_attention", {"q": (batch, heads, queries, head_size), "k": key_shape, "v": key_shape}, options)


def packed(batch: int, length: int, heads: int, head_size: int, **options: Any) -> Case:
    return Case("causal_attention_qkvpacked", {"qkv": (batch, length, 3, heads, head_size)}, options)


def decode(batch: int, heads: int, keys: int, head_size: int, queries: int = 1, **options: Any) -> Case:
    cache = (batch, heads, keys, head_size)
    shapes = {"q": (batch, heads, queries, head_size), "k_cache": cache, "v_cache": cache, "lengths": (batch,)}
    return Case("decode_attention", shapes, options)


def int8_linear(*rows: int, width: int, outputs: int, bias: bool = True, in_float32=(), in_half=()) -> Case:
    shapes = {
        "x": (*rows, width),
        "weight": (outputs, width),
        "scale": (outputs,),
        "bias": (outputs,) if bias else None,
    }
    return Case("int8_linear", shapes, {}, in_float32, in_half)


def linear_cross_entropy(*rows: int, width: int, classes: int, **options: Any) -> Case:
    shapes = {"x": (*rows, width), "weight": (classes, width), "targets": rows}
    return Case("linear_cross_entropy", shapes, options)
