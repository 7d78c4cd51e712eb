"""The behaviour of each private name of PyTorch that the project uses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import pytorch_internals as internals

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def test_a_missing_name_raises_when_it_is_called():
    missing = internals._bind("_no_such_function")
    with pytest.raises(RuntimeError, match="_no_such_function"):
        missing(1)


def test_current_dispatch_mode_is_the_innermost_active_mode():
    assert internals.current_dispatch_mode() is None
    with TorchDispatchMode() as mode:
        assert internals.current_dispatch_mode() is mode
    assert internals.current_dispatch_mode() is None


def test_current_functorch_level_is_set_inside_a_transform():
    levels = []
    torch.func.vmap(lambda x: levels.append(internals.current_functorch_level()) or x)(torch.zeros(2))
    assert levels == [1]
    assert internals.current_functorch_level() is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("use_gelu", [False, True])
def test_addmm_activation_is_relu_or_gelu_of_a_product_and_a_bias(use_gelu, device):
    bias, x, w = (t.to(device) for t in (randn(5), randn(3, 4), randn(4, 5)))
    z = torch.addmm(bias, x, w)
    expected = F.gelu(z, approximate="none" if device == "cpu" else "tanh") if use_gelu else z.relu()
    torch.testing.assert_close(internals.addmm_activation(bias, x, w, use_gelu=use_gelu), expected)


def test_softmax_backward_is_the_gradient_of_softmax():
    scores, dp = randn(2, 3, 7).requires_grad_(), randn(2, 3, 7)
    p = scores.softmax(-1)
    p.backward(dp)
    torch.testing.assert_close(internals.softmax_backward(dp, p.detach(), -1, p.dtype), scores.grad)


def test_int8pack_mm_is_a_product_with_scaled_int8_weights():
    assert internals.has_int8pack_mm()
    x, scale = randn(3, 64, dtype=torch.bfloat16), randn(5, dtype=torch.bfloat16)
    weight = torch.arange(-160, 160).remainder(255).sub(127).to(torch.int8).view(5, 64)
    expected = (x.double() @ weight.double().T) * scale.double()
    torch.testing.assert_close(internals.int8pack_mm(x, weight, scale).double(), expected, rtol=2**-7, atol=2**-4)


@pytest.mark.parametrize("product", [internals._bind("_gone"), lambda x, w, s: x @ w.to(x.dtype).T, lambda x, w: x])
def test_has_int8pack_mm_is_false_for_a_changed_function(product, monkeypatch):
    monkeypatch.setattr(internals, "int8pack_mm", product)
    assert not internals.has_int8pack_mm.__wrapped__()


def test_tensor_version_counts_writes_to_the_memory_of_a_tensor():
    x = torch.zeros(3)
    before = internals.tensor_version(x)
    x.sum()
    assert internals.tensor_version(x) == before
    x[1:].add_(1.0)
    assert internals.tensor_version(x) > before
    with torch.inference_mode():
        assert internals.tensor_version(torch.zeros(3)) is None


def test_storage_weak_refs_are_equal_while_they_are_of_the_same_memory():
    x = torch.zeros(3)
    before = internals.StorageWeakRef(x.untyped_storage())
    assert internals.StorageWeakRef(x[1:].untyped_storage()) == before
    del x  # its address is free again, also for the next tensor
    assert before.expired()
    assert internals.StorageWeakRef(torch.zeros(3).untyped_storage()) != before


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(("op", "algorithm"), [("none", ""), ("relu", ""), ("gelu", "none"), ("gelu", "tanh")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_onednn_linear_takes_weights_as_they_are_and_reordered(dtype, op, algorithm):
    if dtype == torch.bfloat16 and not internals.onednn_supports_bfloat16():
        pytest.skip("this CPU has no bfloat16 products")
    x, weight, bias = randn(2, 24, dtype=dtype), randn(40, 24, dtype=dtype), randn(40, dtype=dtype)
    z = F.linear(x.double(), weight.double(), bias.double())
    expected = {"none": lambda: z, "relu": z.relu, "gelu": lambda: F.gelu(z, approximate=algorithm)}[op]()
    for w in (weight, internals.onednn_reorder_weight(weight, 1)):
        y = internals.onednn_linear(x, w, bias, op, [], algorithm)
        torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_update_grad_scale_grows_after_an_interval_and_backs_off():
    scale, tracker = torch.tensor(8.0), torch.tensor(0, dtype=torch.int32)
    scales = []
    for found_inf in (0.0, 0.0, 0.0, 1.0):
        internals.update_grad_scale_(scale, tracker, torch.tensor(found_inf), 2.0, 0.5, 2)
        scales.append(float(scale))
    assert scales == [8.0, 16.0, 16.0, 8.0]


def test_foreach_div_divides_in_place_by_a_tensor():
    tensors = [torch.full((2,), 6.0), torch.full((3, 1), 9.0)]
    internals.foreach_div_(tensors, torch.tensor(3.0))
    assert [t.flatten()[0].item() for t in tensors] == [2.0, 3.0]


def test_supports_grad_scale_is_true_for_optimizers_that_divide_gradients():
    for fused in (True, False):
        p = nn.Parameter(torch.ones(1))
        p.grad = torch.full((1,), 4.0)
        optimizer = torch.optim.SGD([p], lr=1.0, fused=fused)
        assert internals.supports_grad_scale(optimizer) == fused
        if fused:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            optimizer.step()
            assert p.item() == -1.0
            optimizer.found_inf.fill_(1.0)
            optimizer.step()
            assert p.item() == -1.0


@pytest.mark.parametrize("silent", [False, True])
def test_silence_capturable_warning_silences_steps_outside_of_a_capture(silent, monkeypatch):
    class Stream:
        def is_capturing(self) -> bool:
            return False

    # older versions of PyTorch ask torch.cuda, newer ones torch.accelerator
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", Stream)
    # PyTorch silences new optimizers itself, copies it does not; without gradients a step computes nothing
    optimizer = copy.deepcopy(torch.optim.Adam([nn.Parameter(torch.ones(1))], capturable=True))
    if silent:
        internals.silence_capturable_warning(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert any("capturable" in str(warning.message) for warning in caught) != silent


def test_inductor_cache_dir_is_the_folder_that_inductor_takes(monkeypatch):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    expected = internals.inductor_cache_dir()
    assert cache_dir() == expected  # sets the variable, which monkeypatch removes again


def test_names_in_a_compiled_modules_state_dict_have_the_prefix():
    state = torch.compile(nn.Linear(2, 2)).state_dict()
    assert list(state) == [f"{internals.COMPILED_PREFIX}{name}" for name in ("weight", "bias")]


def test_state_dict_metadata_names_modules_and_their_versions():
    state = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).state_dict()
    assert internals.state_dict_metadata(state)["1"] == {"version": 1}
    assert internals.state_dict_metadata(dict(state)) == {}
