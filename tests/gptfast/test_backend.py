import json
import os
import subprocess
import sys

import pytest
import torch
import triton.language as tl

import kernels
from gptfast import GPT, Backend, GPTConfig
from gptfast.backend import OPERATORS, parse_backend, resolve_backend
from kernels import reference, reference_cpu, tile

TINY = {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 8}
TRITON = dict.fromkeys(OPERATORS, "triton")
EAGER = dict.fromkeys(OPERATORS, "eager")
CPU = {"layer_norm": "cpu", "ffn": "cpu", "attention": "cpu", "loss": "eager"}  # the loss has no faster form there
NAMESPACES = {"triton": kernels, "cpu": reference_cpu, "eager": reference}


def choices(spec="auto", device="cpu", dtype=torch.float32, head_size=64) -> dict[str, str]:
    return dict(resolve_backend(parse_backend(spec), torch.device(device), dtype, head_size))


@pytest.mark.parametrize(
    ("spec", "device", "expected"),
    [
        ("triton", "cpu", TRITON),
        ("triton", "cuda", TRITON),
        ("cpu", "cpu", CPU),
        ("cpu", "meta", CPU),
        ("eager", "cpu", EAGER),
        ("eager", "cuda", EAGER),
        ("auto", "cpu", CPU),
        ("auto", "cuda", TRITON),
        ("auto", "mps", EAGER),
        ("auto", "meta", EAGER),
        ({"attention": "triton", "ffn": "eager"}, "cpu", CPU | {"attention": "triton", "ffn": "eager"}),
        ("attention=eager, loss=triton", "cpu", CPU | {"attention": "eager", "loss": "triton"}),
        ("ffn=eager", "cuda", TRITON | {"ffn": "eager"}),
    ],
    ids=str,
)
def test_backend_choice_per_request_and_device(spec, device, expected):
    """Only the device's type matters, so no GPU is needed."""
    backend = resolve_backend(parse_backend(spec), torch.device(device), torch.float32, 64)
    assert dict(backend) == json.loads(json.dumps(dict(backend))) == expected
    for operator, names in OPERATORS.items():
        for name in names:
            assert getattr(backend, name) is getattr(NAMESPACES[expected[operator]], name)
    assert repr(backend) == f"Backend({', '.join(f'{operator}={choice!r}' for operator, choice in expected.items())})"


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_eager_on_a_cpu_gives_the_bits_of_plain_pytorch(dropout):
    """The CPU's faster forms differ in half-precision attention and in dropout."""
    x = torch.randn(2, 8, 3, 2, 16, dtype=torch.bfloat16)
    residual, weight = torch.randn(5, 7), torch.ones(7)

    def run(backend) -> list[torch.Tensor]:
        torch.manual_seed(0)
        y = backend.causal_attention_qkvpacked(x, dropout_p=dropout)
        return [y, *backend.add_layer_norm(residual, residual, weight, None, dropout_p=dropout)]

    eager, cpu = Backend(**EAGER), Backend(**CPU)
    assert all(map(torch.equal, run(eager), run(reference)))
    assert all(map(torch.equal, run(cpu), run(reference_cpu)))
    assert not all(map(torch.equal, run(eager), run(cpu)))


def test_auto_is_eager_on_a_gpu_for_a_dtype_or_head_size_without_kernels():
    assert choices(device="cuda", dtype=torch.bfloat16, head_size=260) == TRITON | {"attention": "eager"}
    assert choices(device="cuda", dtype=torch.float64) == EAGER
    assert choices(device="cpu", dtype=torch.float64, head_size=260) == CPU


def test_auto_is_eager_on_a_gpu_that_kernels_cannot_be_compiled_for(monkeypatch):
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choices(device="cuda:0") == EAGER
    with pytest.raises(ValueError, match=r"'triton' cannot run layer_norm: .* 7.5, .*; use backend="):
        choices("triton", "cuda:0")


def test_auto_is_resolved_again_when_the_model_moves():
    model = GPT(GPTConfig(**TINY))
    assert dict(model.backend) == CPU
    assert dict(model.to("meta").backend) == EAGER


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_follows_the_model_to_the_gpu_and_back():
    model = GPT(GPTConfig(**TINY))
    assert dict(model.cuda().backend) == TRITON
    assert dict(model.double().backend) == EAGER
    assert dict(model.float().cpu().backend) == CPU
    with pytest.raises(ValueError, match="backend 'cpu' cannot run layer_norm"):
        model.cuda().set_backend("cpu")


def test_set_backend_keeps_the_weights():
    model = GPT(GPTConfig(**TINY), backend="eager")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    model.set_backend("triton")
    assert dict(model.backend) == TRITON
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(*before[name])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cuda", "'cuda'; accepted: auto, triton, cpu, eager"),
        ({"mlp": "triton"}, "'mlp' in backend; accepted: layer_norm, ffn, attention, loss"),
        ({"ffn": "fast"}, "'fast'; accepted: auto, triton, cpu, eager"),
        (7, "backend must be .*, got 7"),
    ],
)
def test_set_backend_rejects_a_bad_request_and_changes_nothing(spec, message):
    model = GPT(GPTConfig(**TINY), backend="eager")
    with pytest.raises(ValueError, match=message):
        model.set_backend(spec)
    assert dict(model.backend) == model.requested_backend == EAGER
    with pytest.raises(ValueError, match="layer_norm, ffn, attention, loss"):
        Backend(layer_norm="eager")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("triton", "cpu", torch.float32, 260), "'triton' cannot run attention: the head size is 260, at most 256"),
        (("triton", "cpu", torch.float64), "'triton' cannot run layer_norm: the dtype is torch.float64"),
        (("cpu", "cuda"), "'cpu' cannot run layer_norm: the model is on 'cuda'"),
        (("attention=cpu", "mps"), "'cpu' cannot run attention: the model is on 'mps'"),
    ],
)
def test_a_choice_that_cannot_run_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=rf"{message}.*; use backend='auto' or 'eager'"):
        choices(*arguments)


def test_a_triton_model_cannot_become_float64():
    with pytest.raises(ValueError, match=r"the dtype is torch\.float64"):
        GPT(GPTConfig(**TINY), backend="triton").double()


def python(code: str) -> str:
    """Run code in a new process without a GPU and without Triton's interpreter, and return its output."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=environment).strip()


BUILD = f"""
import sys
import torch
from gptfast import GPT, GPTConfig
config = GPTConfig(**{TINY})
model = GPT(config)
print(model.backend["ffn"], sys.modules.get("triton"))
try:
    GPT(config, backend="triton")
except ValueError as error:
    print(error)
idx = torch.zeros(1, 8, dtype=torch.long)
model(idx, idx)[1].backward()
print(model.generate(idx, 2).shape[1])
"""
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # importing it raises ImportError


@pytest.mark.parametrize(
    ("preamble", "reason"),
    [
        ("", "Triton kernels do not run on device 'cpu', and no CUDA device was found"),
        (WITHOUT_TRITON, "Triton is not installed"),
    ],
)
def test_without_a_gpu_or_triton_auto_works_and_triton_says_why(preamble, reason):
    """Triton, whose import is slow, is not imported."""
    assert python(preamble + BUILD).splitlines() == [
        "cpu None",
        f"backend 'triton' cannot run layer_norm: {reason}; use backend='auto' or 'eager'",
        "10",
    ]


def test_without_triton_operators_are_the_reference():
    code = "import kernels; from kernels import reference; print(kernels.layer_norm is reference.layer_norm)"
    assert python(WITHOUT_TRITON + code) == "True"


def test_operators_run_the_reference_where_kernels_cannot_run():
    code = """
import torch, kernels
from kernels import reference
q, w_up, w_down = torch.randn(1, 2, 6, 4), torch.randn(7, 4), torch.randn(4, 7)
calls = {"layer_norm": (q, w_up[0], None), "gelu_ffn": (q, w_up, None, w_down, None), "causal_attention": (q, q, q)}
print(all(torch.equal(getattr(kernels, name)(*args), getattr(reference, name)(*args)) for name, args in calls.items()))
"""
    assert python(code) == "True"
