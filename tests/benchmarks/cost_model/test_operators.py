import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks.cost_model import operators
from benchmarks.cost_model.operators import Cost
from gptfast import GPT, GPTConfig
from gptfast.config import PRESETS


def test_costs_add_and_multiply():
    assert Cost(1, 2) + Cost(10, 20) * 3 == Cost(31, 62)


@pytest.mark.parametrize(("moved", "seconds", "bound"), [(10, 2.0, "arithmetic"), (40, 4.0, "memory")])
def test_the_roofline_is_the_slower_of_arithmetic_and_memory(moved, seconds, bound):
    cost = Cost(flops=100, bytes=moved)
    assert cost.seconds(flops_per_second=50.0, bytes_per_second=10.0) == seconds
    assert cost.bound(flops_per_second=50.0, bytes_per_second=10.0) == bound


def test_layer_norm_reads_and_writes_each_tensor_once():
    x, weight, bias, statistics = 6 * 10 * 2, 10 * 2, 10 * 2, 2 * 6 * 4
    passes = operators.layer_norm(6, 10, 2)
    assert passes.inference.bytes == 2 * x + weight + bias
    assert passes.forward.bytes == passes.inference.bytes + statistics
    assert passes.backward.bytes == 3 * x + statistics + weight + weight + bias
    assert operators.layer_norm(6, 10, 2, bias=False).inference.bytes == passes.inference.bytes - bias


@pytest.mark.parametrize("residual", [2, 4])
def test_add_layer_norm_shares_the_pass_of_the_norm(residual):
    """A residual stream with another itemsize has a second gradient."""
    x, stream, parameters, statistics = 6 * 10 * 2, 6 * 10 * residual, 2 * 10 * 2, 2 * 6 * 4
    passes = operators.add_layer_norm(6, 10, 2, residual_itemsize=residual)
    assert passes.forward.bytes == (x + stream + parameters) + (stream + x + statistics)
    second = x if residual != 2 else 0
    assert passes.backward.bytes == (x + stream + stream + statistics + 10 * 2) + (stream + second + parameters)
    assert passes.training.flops == operators.layer_norm(6, 10, 2).training.flops + 2 * 6 * 10


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_tensors_of_its_three_products(bias):
    x, weight, y = 6 * 10 * 4, 10 * 14 * 4, 6 * 14 * 4
    b = 14 * 4 if bias else 0
    passes = operators.linear(6, 10, 14, 4, bias)
    assert passes.forward == Cost(2 * 6 * 10 * 14, x + weight + b + y)
    dx, dweight = y + weight + x, y + x + weight
    assert passes.backward == Cost(2 * 2 * 6 * 10 * 14, dx + dweight + b)


def test_int8_weights_are_a_byte_each():
    passes = operators.int8_linear(6, 10, 14, 2)
    x, weight, scales, y = 6 * 10 * 2, 10 * 14, 14 * 4, 6 * 14 * 2
    assert passes.inference == passes.forward == Cost(2 * 6 * 10 * 14, x + weight + scales + y)
    assert passes.backward == Cost(0, 0)


def test_the_feed_forward_is_the_tensors_of_its_six_products():
    x, h, weight, biases = 6 * 10 * 2, 6 * 40 * 2, 10 * 40 * 2, (10 + 40) * 2
    passes = operators.gelu_ffn(6, 10, 40, 2)
    up, down = x + weight + h, h + weight + x
    assert passes.inference.bytes == up + down + biases
    assert passes.forward.bytes == passes.inference.bytes + h  # the pre-activation
    dh = x + weight + h + h + h  # reads dy, w_down and the pre-activation; writes its gradient and the activation
    dw_down, dx, dw_up = x + h + weight, h + weight + x, h + x + weight
    assert passes.backward.bytes == dh + dw_down + dx + dw_up + biases


def test_the_feed_forward_agrees_with_the_operators_flop_formula():
    with torch.device("meta"):
        x, w_up, w_down = torch.empty(6, 10), torch.empty(40, 10), torch.empty(10, 40)
    gelu_ffn = kernels.gelu_ffn  # registers its formula, which must precede the counter
    with FlopCounterMode(display=False) as counted:
        gelu_ffn(x, w_up, None, w_down, None)
    assert counted.get_total_flops() == operators.gelu_ffn(6, 10, 40, 4, bias=False).inference.flops


def test_attention_counts_the_pairs_under_the_mask():
    queries, keys = 5, 8
    seen = sum(key <= query + keys - queries for query in range(queries) for key in range(keys))
    passes = operators.causal_attention(2, 3, queries, keys, 16, 2)
    assert passes.inference.flops == 4 * 2 * 3 * seen * 16
    assert passes.backward.flops == 10 * 2 * 3 * seen * 16
    q, k, lse = 2 * 3 * queries * 16 * 2, 2 * 3 * keys * 16 * 2, 2 * 3 * queries * 4
    assert passes.inference.bytes == 2 * q + 2 * k
    assert passes.backward.bytes == (3 * q + 2 * k + lse) + (q + 2 * k)


def test_the_loss_is_the_tensors_of_its_passes():
    x, weight, logits, targets = 6 * 10 * 2, 14 * 10 * 2, 6 * 14 * 2, 6 * 8 + 6 * 4
    passes = operators.linear_cross_entropy(6, 10, 14, 2)
    assert passes.inference == Cost(2 * 6 * 14 * 10, (x + weight + logits) + logits + targets)
    dx, dweight = logits + weight + x, logits + x + 2 * weight  # summed in float32
    assert passes.forward.bytes == (x + weight + logits) + 2 * logits + targets + dx + dweight
    assert passes.forward.flops == 3 * passes.inference.flops
    assert passes.backward == Cost(0, 2 * x + 3 * weight)
    # another chunk reads the weight twice more, and reads and writes the sums
    again = operators.linear_cross_entropy(6, 10, 14, 2, chunks=2)
    assert again.forward.bytes - passes.forward.bytes == 2 * weight + 2 * 2 * weight


SMALL = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 6}


@pytest.mark.parametrize(
    "config",
    [
        *(GPTConfig.preset(name) for name in PRESETS),
        GPTConfig(**SMALL, bias=False),
        GPTConfig(**SMALL, qkv_bias=False),
        GPTConfig(**SMALL, bias=False, qkv_bias=True),
        GPTConfig(**SMALL, tie_weights=False),
        GPTConfig(**SMALL, norm_position="post"),
        GPTConfig(**SMALL, position="sinusoidal"),
        GPTConfig(**SMALL, position="none", bias=False, norm_position="post", tie_weights=False),
    ],
)
def test_parameters_are_those_of_the_model(config):
    with torch.device("meta"):
        model = GPT(config)
    assert operators.parameters(config) == sum(p.numel() for p in model.parameters())


def test_decoding_reads_the_weights_once_and_the_cache_of_every_sequence():
    config = GPTConfig.preset("gpt2")
    one, two = (operators.decode_bytes(config, batch, context=100, itemsize=2) for batch in (1, 2))
    cache = 2 * config.n_layer * 100 * config.n_embd * 2
    assert two - one == cache
    assert one - cache == 2 * (124_439_808 - 1024 * 768)
