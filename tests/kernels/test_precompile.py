"""`kernels.warmup` launches every kernel that a model launches, with every specialisation of Triton."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels
from gptfast import GPT, GPTConfig
from gptfast.generation.kv_cache import KVCache
from gptfast.generation.speculative import Draft
from gptfast.quantization import quantize
from kernels import norm, runtime, tile
from tests.support.oracle import DEVICE


def specialised(value: object) -> object:
    """Key that Triton specialises on: dtype and alignment of a tensor, 1 and multiples of 16 among integers."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, tuple(value.block_shape)
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else "16" if value % 16 == 0 else "int"
    return "float" if isinstance(value, float) else value


@contextmanager
def recorded_launches():
    launches = set()

    def run(kernel, *args, grid, warmup, **kwargs):
        constants = {name: value for name, value in kwargs.items() if name not in kernel_options(kwargs)}
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        launches.add((name, tuple(map(specialised, args)), tuple(sorted(constants.items()))))

    def kernel_options(kwargs):
        return {"num_warps", "num_stages"} & set(kwargs)

    with patch.object(InterpretedFunction, "run", run), patch.object(JITFunction, "run", run):
        yield launches


CONFIGS = {
    "small": GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32),
    "dropout": GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=32, dropout=0.1),
    "no biases": GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=3, n_embd=48, bias=False),
    "post-norm": GPTConfig(block_size=48, vocab_size=65, n_layer=2, n_head=2, n_embd=32, norm_position="post"),
    "relu": GPTConfig(block_size=24, vocab_size=65, n_layer=1, n_head=2, n_embd=40, activation="relu"),
}


# the interpreter uses TMA in float16 only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_warmup_covers_training_and_generation(monkeypatch, config: GPTConfig, dtype: torch.dtype, autocast: bool):
    # as under CUDA's autocast
    monkeypatch.setattr(norm, "_autocasts_to_float32", lambda x: runtime.autocast_dtype(x.device) is not None)
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    context = torch.autocast(DEVICE.type, half) if autocast else nullcontext()
    with context, recorded_launches() as warmed_up:
        kernels.warmup(config, dtype, DEVICE, batch_size=2)
    model = GPT(config, backend="triton").to(DEVICE, dtype)
    idx = torch.zeros(2, config.block_size, dtype=torch.int64, device=DEVICE)
    with context, recorded_launches() as launched:
        _, loss = model(idx, idx)
        loss.backward()
        model.eval()
        with torch.no_grad():
            model(idx, idx)
            for length in (1, 5, 16, config.block_size):
                model(idx[:, :length])
            cache = KVCache(config.n_layer, config.block_size)
            for length in (16, 1, 5, 1):
                model(idx[:, :length], cache=cache)
            cache = KVCache(config.n_layer, config.block_size)
            model(idx[:, :16], cache=cache)
            cache.set_lengths(torch.tensor([3, 5], device=DEVICE))
            for length in (1, 2, Draft.tokens + 1):
                model(idx[:, :length], cache=cache)
    assert {name for name, _, _ in launched} <= {name for name, _, _ in warmed_up}
    assert launched <= warmed_up


def test_warmup_covers_a_residual_stream_in_another_dtype():
    config = CONFIGS["small"]
    with torch.autocast(DEVICE.type, torch.bfloat16), recorded_launches() as warmed_up:
        kernels.warmup(config, torch.float32, DEVICE, residual_dtype=torch.bfloat16)
    model = GPT(config, backend="triton").to(DEVICE)
    model.set_residual_dtype(torch.bfloat16)
    idx = torch.zeros(1, config.block_size, dtype=torch.int64, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16), recorded_launches() as launched:
        model(idx, idx)[1].backward()
    assert launched <= warmed_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", ["small", "no biases", "only qkv biases"])
def test_warmup_covers_int8_weights_on_request(name: str, dtype: torch.dtype, autocast: bool):
    config = CONFIGS.get(name) or dataclasses.replace(CONFIGS["no biases"], qkv_bias=True, pad_vocab_size_to=16)
    context = torch.autocast(DEVICE.type, torch.bfloat16) if autocast else nullcontext()
    with context, recorded_launches() as warmed_up:
        kernels.warmup(config, dtype, DEVICE, int8=True)
    with context, recorded_launches() as without:
        kernels.warmup(config, dtype, DEVICE)
    model = quantize(GPT(config, backend="triton").to(DEVICE, dtype).eval())
    idx = torch.zeros(66, 1, dtype=torch.int64, device=DEVICE)
    with context, recorded_launches() as launched, torch.no_grad():
        for batch in (1, 2, 15, 16, 31, 32, 48, 63, 64, 65, 66):
            model(idx[:batch])
    products = {launch for launch in launched if "int8" in launch[0]}
    assert {name for name, _, _ in products} == {"_int8_sums_kernel", "_int8_tiles_kernel"}
    assert products <= warmed_up
    assert not products & without


def test_warmup_rejects_bad_arguments():
    config = CONFIGS["small"]
    with pytest.raises(TypeError, match=r"dtype.*torch.float64"):
        kernels.warmup(config, torch.float64, DEVICE)
    with pytest.raises(ValueError, match=r"batch_size.* 0"):
        kernels.warmup(config, torch.float32, DEVICE, batch_size=0)


def test_warmup_names_an_unsupported_device(monkeypatch):
    monkeypatch.setattr(tile, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"'cpu'.*no CUDA device"):
        kernels.warmup(CONFIGS["small"], torch.float32, "cpu")
    monkeypatch.setattr(runtime, "TRITON_INSTALLED", False)
    with pytest.raises(ValueError, match="not installed"):
        kernels.warmup(CONFIGS["small"], torch.float32, "cpu")
