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
    passes = operators.layer_norm(5, 7, 2)
    assert passes.training == passes.forward + passes.backward


def test_the_roofline_is_the_slower_of_arithmetic_and_memory():
    assert Cost(flops=100, bytes=10).seconds(flops_per_second=50.0, bytes_per_second=10.0) == 2.0
    assert Cost(flops=100, bytes=40).seconds(flops_per_second=50.0, bytes_per_second=10.0) == 4.0


def test_layer_norm_reads_and_writes_each_tensor_once():
    """Against the sizes of real tensors: inputs and outputs of the operator, forward and backward."""
    x, weight, bias = torch.empty(6, 10, dtype=torch.bfloat16), *torch.empty(2, 10, dtype=torch.bfloat16)
    statistics = 2 * torch.empty(6).nbytes
    passes = operators.layer_norm(6, 10, 2)
    assert passes.inference.bytes == 2 * x.nbytes + weight.nbytes + bias.nbytes
    assert passes.forward.bytes == passes.inference.bytes + statistics
    assert passes.backward.bytes == 3 * x.nbytes + statistics + weight.nbytes + weight.nbytes + bias.nbytes
    assert operators.layer_norm(6, 10, 2, bias=False).inference.bytes == passes.inference.bytes - bias.nbytes


def test_the_residual_addition_shares_the_norms_pass():
    rows = torch.empty(6, 10, dtype=torch.bfloat16).nbytes
    alone, fused = operators.layer_norm(6, 10, 2), operators.add_layer_norm(6, 10, 2)
    assert fused.inference.bytes - alone.inference.bytes == 2 * rows  # reads the residual, writes the sum
    assert fused.backward.bytes - alone.backward.bytes == rows  # reads the gradient of the sum
    # apart, the addition reads both and writes the sum, and the norm reads it again
    assert fused.inference.bytes == alone.inference.bytes + 3 * rows - rows


@pytest.mark.parametrize("bias", [True, False])
def test_linear_by_the_tensors_of_its_three_products(bias):
    x, weight, y = 6 * 10 * 4, 10 * 14 * 4, 6 * 14 * 4
    b = 14 * 4 if bias else 0
    passes = operators.linear(6, 10, 14, 4, bias)
    assert passes.forward == Cost(2 * 6 * 10 * 14, x + weight + b + y)
    dx, dweight = y + weight + x, y + x + weight
    assert passes.backward == Cost(2 * 2 * 6 * 10 * 14, dx + dweight + b)


def test_weights_of_8_bits_are_a_byte_each():
    passes = operators.int8_linear(6, 10, 14, 2)
    x, weight, scales, y = 6 * 10 * 2, 10 * 14, 14 * 4, 6 * 14 * 2
    assert passes.inference == passes.forward == Cost(2 * 6 * 10 * 14, x + weight + scales + y)
    assert passes.backward == Cost(0, 0)


def test_feed_forward_by_the_tensors_of_its_six_products():
    x, h, weight, biases = 6 * 10 * 2, 6 * 40 * 2, 10 * 40 * 2, (10 + 40) * 2
    passes = operators.gelu_ffn(6, 10, 40, 2)
    up, down = x + weight + h, h + weight + x
    assert passes.inference.bytes == up + down + biases
    assert passes.forward.bytes == passes.inference.bytes + h  # the pre-activation
    dh = x + weight + h + h + h  # reads dy, w_down and the pre-activation; writes its gradient and the activation
    dw_down, dx, dw_up = x + h + weight, h + weight + x, h + x + weight
    assert passes.backward.bytes == dh + dw_down + dx + dw_up + biases


def test_attention_counts_the_pairs_under_the_mask():
    queries, keys = 5, 8
    seen = sum(key <= query + keys - queries for query in range(queries) for key in range(keys))
    passes = operators.causal_attention(2, 3, queries, keys, 16, 2)
    assert passes.inference.flops == 4 * 2 * 3 * seen * 16
    assert passes.backward.flops == 10 * 2 * 3 * seen * 16
    q, k = 2 * 3 * queries * 16 * 2, 2 * 3 * keys * 16 * 2
    assert passes.inference.bytes == 2 * q + 2 * k
    lse = 2 * 3 * queries * 4
    assert passes.backward.bytes == (3 * q + 2 * k + lse) + (q + 2 * k)


def test_products_agree_with_the_operators_own_formulas():
    with torch.device("meta"):
        x, w_up, w_down = torch.empty(6, 10), torch.empty(40, 10), torch.empty(10, 40)
    gelu_ffn = kernels.gelu_ffn  # imported now: the counter sees the formulas that are registered when it starts
    with FlopCounterMode(display=False) as counted:
        gelu_ffn(x, w_up, None, w_down, None)
    assert counted.get_total_flops() == operators.gelu_ffn(6, 10, 40, 4, bias=False).inference.flops


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_the_presets(name):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert operators.parameters(model.config) == model.get_num_params(non_embedding=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": False},
        {"qkv_bias": False},
        {"bias": False, "qkv_bias": True},
        {"tie_weights": False},
        {"norm_position": "post"},
        {"position": "sinusoidal"},
        {"position": "none", "bias": False, "norm_position": "post", "tie_weights": False},
    ],
    ids=str,
)
def test_parameters_of_every_shape(changes):
    config = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=6, **changes)
    assert operators.parameters(config) == sum(p.numel() for p in GPT(config).parameters())


def test_the_loss_by_the_tensors_of_its_passes():
    x, weight, logits, targets = 6 * 10 * 2, 14 * 10 * 2, 6 * 14 * 2, 6 * 8 + 6 * 4
    passes = operators.linear_cross_entropy(6, 10, 14, 2)
    assert passes.inference == Cost(2 * 6 * 14 * 10, (x + weight + logits) + logits + targets)
    dx, dweight = logits + weight + x, logits + x + 2 * weight  # summed in float32
    assert passes.forward.bytes == (x + weight + logits) + 2 * logits + targets + dx + dweight
    assert passes.forward.flops == 3 * passes.inference.flops
    assert passes.backward == Cost(0, 2 * x + 3 * weight)
    # another chunk reads the weight again, twice, and the sums, and writes these
    again = operators.linear_cross_entropy(6, 10, 14, 2, chunks=2)
    assert again.forward.bytes - passes.forward.bytes == 2 * weight + 2 * 2 * weight


def test_a_residual_stream_of_another_size():
    """Reads x, the stream and the weight, writes the sum and the norm; back with a gradient for each."""
    x, stream, parameters, statistics = 6 * 10 * 2, 6 * 10 * 4, 2 * 10 * 2, 2 * 6 * 4
    passes = operators.add_layer_norm(6, 10, 2, residual_itemsize=4)
    assert passes.forward.bytes == (x + stream + parameters) + (stream + x + statistics)
    assert passes.backward.bytes == (x + stream + stream + statistics + 10 * 2) + (stream + x + parameters)


def test_decoding_reads_the_weights_once_and_the_cache_of_every_sequence():
    config = GPTConfig.preset("gpt2")
    one, two = (operators.decode_bytes(config, batch, context=100, itemsize=2) for batch in (1, 2))
    cache = 2 * config.n_layer * 100 * config.n_embd * 2
    assert two - one == cache
    assert one - cache == 2 * (124_439_808 - 1024 * 768)
