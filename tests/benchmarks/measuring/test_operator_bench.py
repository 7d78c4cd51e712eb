import math
import weakref

import pytest
import torch

import kernels
from benchmarks.measuring.bench import UnavailableError, WrongResultError
from benchmarks.measuring.operator_bench import MODES, OperatorBench, Provider
from benchmarks.operators import OPERATORS
from kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {"copy_bytes_per_second": 1e12, "matrix_flops_per_second": {"float32": 1e13}}
FP32 = torch.float32
NORM = OPERATORS["layer_norm"].case(40, 48, dtype=FP32)
LOSS = OPERATORS["linear_cross_entropy"].case(40, 16, 50, dtype=FP32)
CHUNKED = ["PyTorch chunked"] * hasattr(torch.nn.functional, "linear_cross_entropy")


def measure(case, *names):
    """A bench of providers of the operator table, all of them by default."""
    providers = case.operator.providers
    return OperatorBench(case, [providers[name] for name in names or providers], DEVICE, LIMITS)


def compare(case, modes=MODES, **functions):
    """A bench of given functions."""
    providers = [
        Provider(name, lambda case, function=function: function, modes) for name, function in functions.items()
    ]
    return OperatorBench(case, providers, DEVICE, LIMITS)


@pytest.mark.parametrize(
    ("name", "values", "dtype"),
    [
        ("layer_norm", (40, 48), FP32),
        ("gelu_ffn", (40, 16, 64), FP32),
        ("add_layer_norm", (40, 48), FP32),
        ("causal_attention", (2, 3, 40, 16), FP32),
        ("causal_attention", (1, 2, 40, 16), torch.float16),
        ("causal_attention_qkvpacked", (2, 3, 40, 16), FP32),
    ],
)
def test_triton_and_eager_are_measured_in_every_mode(name, values, dtype):
    bench = measure(OPERATORS[name].case(*values, dtype=dtype), "triton", "eager")
    for mode in MODES:
        for provider in ("triton", "eager"):
            times, row = bench.row(provider, mode)
            assert len(times.device) >= 5
            assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
            assert row["error"] < 1e-2
            assert (row["provider"], row["mode"], row["suite"]) == (provider, mode, name)
            assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"]["median"])
            assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"]["median"])
            assert row["copy_share"] == pytest.approx(row["bytes_per_second"] / 1e12)


@pytest.mark.parametrize(
    ("name", "values", "dtype", "mode", "providers", "flops", "moved"),
    [
        ("gelu_ffn", (40, 16, 64), FP32, "both", ["triton fused", "triton unfused"], 12 * 40 * 16 * 64, None),
        # a full cache
        ("decode_attention", (2, 3, 40, 16), FP32, "forward", ["SDPA"], None, 4 * 2 * 3 * (2 * 16 + 2 * 40 * 16)),
        # int8 weights, a float32 scale for each output
        (
            *("int8_linear", (3, 64, 40), torch.bfloat16, "forward"),
            *(["_weight_int8pack_mm", "F.linear"], None, 2 * 3 * (64 + 40) + 64 * 40 + 4 * 40),
        ),
        ("ffn_up", (40, 16, 24), FP32, "forward", ["_addmm_activation"], 2 * 40 * 16 * 24, None),
        ("linear_cross_entropy", (40, 16, 50), FP32, "both", CHUNKED, 6 * 40 * 16 * 50, None),
        ("layer_norm", (40, 48), FP32, "both", ["eager compiled"], None, None),
    ],
)
def test_peers_of_an_operator_are_measured(name, values, dtype, mode, providers, flops, moved):
    bench = measure(OPERATORS[name].case(*values, dtype=dtype), "triton", "eager", *providers)
    for provider in bench.providers:
        _, row = bench.row(provider, mode)
        assert row["error"] < (2e-2 if dtype == torch.bfloat16 else 1e-5)
        assert row["flops"] == flops or flops is None
        assert row["bytes"] == moved or moved is None


def test_the_loss_has_no_backward_of_its_own():
    with pytest.raises(UnavailableError, match="eager has no backward pass"):
        measure(LOSS, "eager").row("eager", "backward")


def test_int8_errors_are_against_the_quantized_weights():
    bench = measure(OPERATORS["int8_linear"].case(3, 64, 40), "triton", "F.linear")
    assert bench.errors["triton"] < 0.004 < bench.errors["F.linear"] < 0.02


def test_int8_weights_are_quantized_once(monkeypatch):
    calls = []
    quantize = kernels.quantize_int8
    monkeypatch.setattr(kernels, "quantize_int8", lambda weight: calls.append(1) or quantize(weight))
    function = OPERATORS["int8_linear"].case(3, 64, 40, dtype=FP32).reference
    x, weight = torch.randn(3, 64), torch.randn(40, 64)
    assert torch.equal(function(x, weight), function(x, weight))
    assert len(calls) == 1


def test_providers_that_compile_can_be_left_out():
    case = OPERATORS["causal_attention"].case(2, 3, 40, 16, compiled=False)
    assert {name for _, name in case.measurements()} == {
        "triton", "eager", "SDPA FlashAttention-2", "SDPA cuDNN"
    }  # fmt: skip
    modes = [mode for mode, name in OPERATORS["gelu_ffn"].cases[0].measurements() if name == "_addmm_activation"]
    assert modes == ["forward"]


def detached_mean(x, weight, bias):
    mean = x.mean(-1, keepdim=True).detach()
    return (x - mean) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize(
    ("case", "function", "modes", "what"),
    [
        (NORM, lambda *tensors: 1.01 * reference.layer_norm(*tensors), MODES, r"the result .* 1\.00e-02"),
        (NORM, lambda *tensors: math.nan * reference.layer_norm(*tensors), MODES, "the result .* nan"),
        (NORM, detached_mean, MODES, "the gradient of x "),
        # a loss has no separate backward
        (LOSS, lambda x, w: LOSS.reference(x, w.detach()) + 0 * w.sum(), ("forward", "both"), "the gradient of w_head"),
        # one of two results
        (
            OPERATORS["add_layer_norm"].case(40, 48, dtype=FP32),
            lambda x, *others: (reference.add_layer_norm(x, *others)[0], x),
            MODES,
            "the result",
        ),
        # one head is compared; an operator without the mask is wrong in each
        (
            OPERATORS["causal_attention"].case(2, 3, 40, 16, dtype=FP32),
            torch.nn.functional.scaled_dot_product_attention,
            MODES,
            "the result",
        ),
    ],
)
def test_a_wrong_result_or_gradient_has_no_speed_in_any_mode(case, function, modes, what):
    bench = compare(case, modes, peer=function)
    for mode in modes:
        with pytest.raises(WrongResultError, match=what):
            bench.row("peer", mode)


def test_a_failing_peer_is_unavailable_and_our_own_failure_an_error():
    held = []

    def broken(x, *_):
        y = x * 2
        held.append(weakref.ref(y))
        raise RuntimeError("no kernel\nfor this")

    bench = compare(NORM, peer=broken, triton=broken, eager=reference.layer_norm)
    with pytest.raises(UnavailableError, match=r"^RuntimeError: no kernel$"):
        bench.row("peer", "forward")
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.row("triton", "forward")
    assert bench.row("eager", "both")[1]["mode"] == "both"
    assert all(tensor() is None for tensor in held)


def test_out_of_memory_makes_any_provider_unavailable():
    def greedy(*_):
        raise torch.OutOfMemoryError("tried to allocate too much")

    with pytest.raises(UnavailableError, match="out of memory: tried to allocate too much"):
        compare(NORM, eager=greedy).row("eager", "forward")


def test_out_of_memory_in_the_backward_leaves_the_forward():
    class Greedy(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            Greedy.calls += 1
            if Greedy.calls > 1:  # the check passes
                raise torch.OutOfMemoryError("tried to allocate too much")
            return dy

    bench = compare(NORM, peer=lambda *tensors: Greedy.apply(reference.layer_norm(*tensors)))
    with pytest.raises(UnavailableError, match="out of memory"):
        bench.row("peer", "backward")
    assert bench.row("peer", "forward")[1]["mode"] == "forward"


def test_a_dtype_without_a_measured_matrix_rate_has_no_share():
    _, row = measure(OPERATORS["layer_norm"].case(40, 48, dtype=torch.float16), "eager").row("eager", "forward")
    assert row["matrix_share"] is None
    assert row["copy_share"] > 0


def test_attention_is_measured_in_the_layout_of_the_model():
    q, *_ = OPERATORS["causal_attention"].case(2, 3, 40, 16).inputs(DEVICE)
    assert q.shape == (2, 3, 40, 16)
    assert q.transpose(1, 2).is_contiguous()
