import json
import os
import subprocess
import sys

import pytest
import torch
import triton.language as tl

import kernels
from gptfast import GPT, Backend, GPTConfig
from gptfast.backend import parse, resolve
from kernels import reference, tile

TINY = {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": 2, "n_embd": 8}
ALL_TRITON = {"layer_norm": "triton", "ffn": "triton", "attention": "triton", "loss": "triton"}


def test_one_word_decides_for_all():
    assert set(GPT(GPTConfig(**TINY), backend="eager").backend.values()) == {"eager"}
    assert dict(GPT(GPTConfig(**TINY), backend="triton").backend) == ALL_TRITON


@pytest.mark.parametrize("request_", [{"attention": "triton", "ffn": "eager"}, "attention=triton,ffn=eager"])
def test_a_mapping_decides_one_by_one(request_):
    backend = GPT(GPTConfig(**TINY), backend=request_).backend
    assert dict(backend) == {"layer_norm": "eager", "ffn": "eager", "attention": "triton", "loss": "eager"}
    assert backend.causal_attention is kernels.causal_attention
    assert backend.gelu_ffn is reference.gelu_ffn
    assert json.dumps(dict(backend))
    assert repr(backend) == "Backend(layer_norm='eager', ffn='eager', attention='triton', loss='eager')"


def test_auto_is_eager_on_the_cpu_even_where_the_interpreter_could_run():
    assert set(GPT(GPTConfig(**TINY)).backend.values()) == {"eager"}


def test_auto_is_eager_for_a_dtype_or_head_size_without_kernels():
    wide = GPTConfig(**TINY | {"n_embd": 520, "n_head": 2})
    assert GPT(wide, backend="auto").backend["attention"] == "eager"
    model = GPT(GPTConfig(**TINY)).double()
    assert set(model.backend.values()) == {"eager"}


def test_auto_on_a_gpu_is_triton_where_there_is_a_kernel():
    """Decided without a GPU: only the device's kind matters."""

    def choices(dtype: torch.dtype, head_size: int) -> dict[str, str]:
        return dict(resolve(parse("auto"), torch.device("cuda"), dtype, head_size))

    assert choices(torch.bfloat16, 64) == ALL_TRITON
    assert choices(torch.bfloat16, 260) == ALL_TRITON | {"attention": "eager"}
    assert set(choices(torch.float64, 64).values()) == {"eager"}


def test_auto_is_eager_on_a_gpu_that_kernels_cannot_be_compiled_for(monkeypatch):
    monkeypatch.setattr(tile, "INTERPRETED", tl.constexpr(False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    gpu = torch.device("cuda", 0)
    assert set(resolve(parse("auto"), gpu, torch.float32, 64).values()) == {"eager"}
    with pytest.raises(
        ValueError, match=r"cannot run layer_norm: the GPU has compute capability 7.5, .*; use backend="
    ):
        resolve(parse("triton"), gpu, torch.float32, 64)


def test_auto_is_decided_anew_when_the_model_moves(monkeypatch):
    model = GPT(GPTConfig(**TINY))
    seen = []
    monkeypatch.setattr("gptfast.model.resolve", lambda *arguments: seen.append(arguments) or resolve(*arguments))
    model.to("meta", torch.float64)
    assert seen[-1] == (parse("auto"), torch.device("meta"), torch.float64, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_follows_the_model_to_the_gpu_and_back():
    model = GPT(GPTConfig(**TINY))
    assert set(model.backend.values()) == {"eager"}
    assert dict(model.cuda().backend) == ALL_TRITON
    assert set(model.double().backend.values()) == {"eager"}
    assert set(model.float().cpu().backend.values()) == {"eager"}


def test_switching_keeps_the_weights():
    model = GPT(GPTConfig(**TINY), backend="eager")
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    model.set_backend("triton")
    assert dict(model.backend) == ALL_TRITON
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_a_refused_switch_changes_nothing():
    model = GPT(GPTConfig(**TINY), backend="eager")
    with pytest.raises(ValueError, match="unknown backend"):
        model.set_backend("cuda")
    assert set(model.backend.values()) == {"eager"}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("cuda", "unknown backend 'cuda'; accepted: auto, triton, eager"),
        ({"mlp": "triton"}, "unknown operator 'mlp' in backend; accepted: layer_norm, ffn, attention, loss"),
        ({"ffn": "fast"}, "unknown backend 'fast'; accepted: auto, triton, eager"),
        (7, "backend must be a word or a mapping from operator to word, got int"),
    ],
)
def test_bad_requests(request_, message):
    with pytest.raises(ValueError, match=message):
        parse(request_)


def test_a_backend_needs_every_choice():
    with pytest.raises(ValueError, match="Backend needs 'triton' or 'eager' for each of layer_norm, ffn"):
        Backend(torch.device("cpu"), layer_norm="eager")


def test_a_head_size_that_attention_cannot_hold():
    config = GPTConfig(**TINY | {"n_embd": 520, "n_head": 2})
    with pytest.raises(ValueError, match="cannot run attention: the head size is 260, at most 256 is accepted; use"):
        GPT(config, backend="triton")


def test_a_dtype_without_kernels():
    model = GPT(GPTConfig(**TINY), backend="eager").double()
    message = "cannot run layer_norm: the dtype is torch.float64, float32, float16 or bfloat16 is accepted; use"
    with pytest.raises(ValueError, match=message):
        model.set_backend("triton")
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**TINY), backend="triton").double()


def python(code: str, **environment: str) -> str:
    """What a fresh Python prints that sees no GPU and does not interpret kernels."""
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BUILD = f"""
import torch
from gptfast import GPT, GPTConfig
def attempt(backend):
    try:
        print(dict(GPT(GPTConfig(**{TINY}), backend=backend).backend)["ffn"])
    except ValueError as error:
        print(error)
"""


def test_without_a_gpu_auto_is_eager_and_triton_says_why():
    lines = python(BUILD + "attempt('auto'); attempt('triton')").splitlines()
    assert lines[0] == "eager"
    assert lines[1] == (
        "backend 'triton' cannot run layer_norm: Triton kernels do not run on device 'cpu', and no CUDA device was "
        "found; use backend='auto' or 'eager'"
    )


WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"  # what Python does for a package that is not there


def test_without_triton_everything_but_triton_works():
    code = """
attempt("auto")
attempt("triton")
import kernels
from kernels import reference
model = GPT(GPTConfig(**TINY))
idx = torch.zeros(1, 8, dtype=torch.long)
model(idx, idx)[1].backward()
print(model.generate(idx, 2).shape[1], kernels.layer_norm is reference.layer_norm)
"""
    lines = python(WITHOUT_TRITON + BUILD + f"TINY = {TINY}" + code).splitlines()
    assert lines[0] == "eager"
    assert lines[1] == (
        "backend 'triton' cannot run layer_norm: Triton is not installed; use backend='auto' or 'eager'"
    )
    assert lines[2] == "10 True"


def test_importing_the_packages_does_not_import_triton():
    assert python("import sys, gptfast, kernels; print('triton' in sys.modules)") == "False"


def test_operators_run_the_reference_where_kernels_cannot_run():
    code = """
import torch, kernels
from kernels import reference
x, w = torch.randn(3, 5), torch.ones(5)
print(torch.equal(kernels.layer_norm(x, w, None), reference.layer_norm(x, w, None)))
w_up, w_down = torch.randn(7, 5), torch.randn(5, 7)
print(torch.equal(kernels.gelu_ffn(x, w_up, None, w_down, None), reference.gelu_ffn(x, w_up, None, w_down, None)))
q = torch.randn(1, 2, 6, 4)
print(torch.equal(kernels.causal_attention(q, q, q), reference.causal_attention(q, q, q)))
"""
    assert python(code).split() == ["True"] * 3
