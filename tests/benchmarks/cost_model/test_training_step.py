from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cost_model import operators
from benchmarks.cost_model.training_step import StepCost, summed
from gptfast import GPT, GPTConfig, flops
from gptfast.config import PRESETS
from tests.support.oracle import DEVICE

CONFIG = GPTConfig(block_size=16, vocab_size=31, n_layer=1, n_head=2, n_embd=32)


@pytest.mark.parametrize("name", PRESETS)
def test_the_products_of_a_step_are_those_of_the_model_count(name):
    """The model's count leaves out the recomputed scores, one of the five products of attention's backward."""
    config, batch, length = GPTConfig.preset(name), 2, 1024
    step = StepCost(config, batch, length).by_kind()
    attention = operators.causal_attention(batch, config.n_head, length, length, config.head_size, 2)
    recomputed = config.n_layer * attention.inference.flops // 2  # one of the five products
    products = sum(cost.flops for cost in step.values())
    per_token = flops.training_flops_per_token(config, length, causal=True)
    assert products - recomputed == batch * length * per_token


@pytest.mark.parametrize("residual", [2, 4])
def test_the_passes_of_a_block_move_the_bytes_of_its_operators(residual: int):
    """The gradient of a bias is a separate pass here, which the operator's least does not count."""
    config, batch, length = GPTConfig.preset("gpt2"), 2, 1024
    rows, width = batch * length, config.n_embd
    step = StepCost(config, batch, length, residual_itemsize=residual)
    passes = [p for p in step.block_forward() + step.block_backward() if not p.name.endswith("dbias")]
    found = summed(passes)
    norms = operators.add_layer_norm(rows, width, 2, residual_itemsize=residual).training
    wider = 2 * 2 * (2 + 1 + 2) * width  # their parameters are in float32
    biases = 2 * width  # gradients of biases are written by the passes left out
    assert found["residual and layer norm"].bytes == 2 * norms.bytes + wider
    attention = operators.causal_attention(batch, config.n_head, length, length, config.head_size, 2)
    assert found["attention"] == attention.training
    linear = operators.linear(rows, width, 3 * width, 2).training + operators.linear(rows, width, width, 2).training
    assert found["attention projections"] == operators.Cost(linear.flops, linear.bytes - 4 * biases)
    ffn = operators.gelu_ffn(rows, width, 4 * width, 2).training
    in_float32 = 2 * 4 * width**2 * 2  # gradients of both weights, two bytes more each
    assert found["feed-forward"] == operators.Cost(ffn.flops, ffn.bytes - 5 * biases + in_float32)


def model(**settings) -> tuple[GPT, Tensor]:
    torch.manual_seed(0)
    built = GPT(GPTConfig(**{**vars(CONFIG), **settings}), backend="triton").to(DEVICE)
    return built, torch.randint(31, (3, 16)).to(DEVICE)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_keeps_the_bytes_of_the_table(residual: torch.dtype, checkpointing: bool):
    """The difference between a model of three blocks and one of two, without weights and their casts."""

    def kept(layers: int) -> int:
        built, idx = model(n_layer=layers)
        built.set_residual_dtype(residual)
        built.set_activation_checkpointing(checkpointing)
        own = {p.data_ptr() for p in built.parameters()}
        weights = {tuple(p.shape) for p in built.parameters()} | {tuple(p.t().shape) for p in built.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tuple(tensor.shape) not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        alive: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast(DEVICE.type, torch.bfloat16):
            built(idx, idx)
        return sum(seen.values())

    step = StepCost(CONFIG, batch=3, length=16, residual_itemsize=residual.itemsize)
    expected = step.block_input_bytes() if checkpointing else step.kept_bytes()
    assert kept(3) - kept(2) == expected


def test_a_block_runs_only_passes_of_the_table():
    """Every operator on a tensor of all tokens is a pass of the table: no cast, no copy, no other sum."""
    built, _ = model()
    calls: Counter[str] = Counter()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made = result if isinstance(result, (tuple, list)) else (result,)
            tensors = [t for t in [*args, *made] if isinstance(t, Tensor)]
            # [B, T, ...] or [B * T, ...]; no weight has these sizes
            if any(t.dim() > 1 and t.shape[0] in (3, 48) for t in tensors) and not function.is_view:
                calls[function.name().split("::")[1].split(".")[0]] += 1
            return result

    block = built.transformer.h[0]
    x = torch.randn(3, 16, 32, device=DEVICE, requires_grad=True)
    pending = torch.randn(3, 16, 32, device=DEVICE).bfloat16().requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        h, m = block(x, pending)  # casts the weights before recording
        with Recorder():
            h, m = block(x, pending)
    step = StepCost(CONFIG, batch=3, length=16)
    forward = {"add_layer_norm": 2, "causal_attention_qkvpacked": 1, "gelu_ffn": 1, "addmm": 2}
    recorded = Counter({name: count for name, count in calls.items() if name != "_unsafe_view"})
    assert recorded == forward
    assert len(step.block_forward()) == sum(forward.values()) + 1  # the feed-forward has two
    calls.clear()
    dh, dm = torch.randn_like(h), torch.randn_like(m)
    with Recorder():
        torch.autograd.backward((h, m), (dh, dm))
    backward = {name: count for name, count in calls.items() if name not in ("_unsafe_view", "detach")}
    # two linear layers: gradients of input, weight and bias each; the feed-forward has five passes
    assert backward == {
        "gelu_ffn_backward": 1,
        "add_layer_norm_backward": 2,
        "causal_attention_qkvpacked_backward": 1,
        "mm": 4,
        "sum": 2,
    }
    assert len(step.block_backward()) == sum(backward.values()) + 4
