import math
import weakref
from dataclasses import replace

import pytest
import torch

import kernels
from benchmarks.measuring import operator_cases
from benchmarks.measuring.operator_bench import MODES, Comparison, Provider, UnavailableError, WrongResultError
from benchmarks.measuring.operator_providers import PROVIDERS
from kernels import reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LIMITS = {"copy_bytes_per_second": 1e12, "matrix_flops_per_second": {"float32": 1e13}}
SMALL = [
    operator_cases.layer_norm(40, 48, torch.float32),
    operator_cases.gelu_ffn(40, 16, torch.float32),
    operator_cases.add_layer_norm(40, 48, torch.float32),
    operator_cases.causal_attention(2, 3, 40, 16, torch.float32),
    operator_cases.causal_attention(1, 2, 40, 16, torch.float16),
    operator_cases.causal_attention_qkvpacked(2, 3, 40, 16, torch.float32),
]
NORM = SMALL[0]


def compare(case, **operators):
    providers = [Provider(name, lambda case, operator=operator: operator) for name, operator in operators.items()]
    return Comparison(case, providers, DEVICE, LIMITS)


@pytest.mark.parametrize("name", ["triton fused", "triton unfused"])
def test_both_implementations_of_the_feed_forward_are_measured(name):
    case = operator_cases.gelu_ffn(40, 16, torch.float32)
    comparison = Comparison(case, [PROVIDERS["gelu_ffn"][name]], DEVICE, LIMITS)
    assert all(comparison.row(name, mode)[1]["error"] < 1e-2 for mode in MODES)


def test_decoding_is_measured():
    case = operator_cases.decode_attention(2, 3, 40, 16, torch.float32)
    providers = PROVIDERS["decode_attention"]
    comparison = Comparison(case, list(providers.values()), DEVICE, LIMITS)
    rows = [comparison.row(name, "forward")[1] for name in providers]
    assert [row["bytes"] for row in rows] == [4 * 2 * 3 * (2 * 16 + 2 * 40 * 16)] * 3


def test_weights_of_8_bits_are_measured():
    """Beside the weights before they were rounded, which are a percent off."""
    case = operator_cases.int8_linear(3, 64, 40, torch.bfloat16)
    providers = PROVIDERS["int8_linear"]
    comparison = Comparison(case, list(providers.values()), DEVICE, LIMITS)
    rows = {name: comparison.row(name, "forward")[1] for name in providers}
    assert {row["bytes"] for row in rows.values()} == {2 * 3 * (64 + 40) + 64 * 40 + 4 * 40}
    assert rows["triton"]["error"] < 0.004 < rows["F.linear"]["error"] < 0.02


def test_weights_are_rounded_once(monkeypatch):
    calls = []
    whole = kernels.quantize_int8
    monkeypatch.setattr(kernels, "quantize_int8", lambda weight: calls.append(1) or whole(weight))
    operator = PROVIDERS["int8_linear"]["eager"].build(operator_cases.int8_linear(3, 64, 40, torch.float32))
    x, weight = torch.randn(3, 64), torch.randn(40, 64)
    assert torch.equal(operator(x, weight), operator(x, weight))
    assert len(calls) == 1


def test_the_loss_is_measured():
    case = operator_cases.linear_cross_entropy(40, 16, 50, torch.float32)
    names = ["triton", "eager"] + ["PyTorch chunked"] * hasattr(torch.nn.functional, "linear_cross_entropy")
    providers = [PROVIDERS["linear_cross_entropy"][name] for name in names]
    comparison = Comparison(case, providers, DEVICE, LIMITS)
    rows = [comparison.row(name, "both")[1] for name in names]
    assert [row["flops"] for row in rows] == [6 * 40 * 16 * 50] * len(names)
    assert max(row["error"] for row in rows) < 1e-5


def test_the_product_alone_is_measured():
    case = operator_cases.ffn_up(40, 16, 24, torch.float32)
    providers = PROVIDERS["ffn_up"]
    comparison = Comparison(case, list(providers.values()), DEVICE, LIMITS)
    rows = [comparison.row(name, "forward")[1] for name in providers]
    assert [row["flops"] for row in rows] == [2 * 40 * 16 * 24] * 3


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_our_kernels_and_eager_are_measured_in_every_mode(case):
    comparison = Comparison(case, [PROVIDERS[case.suite][name] for name in ("triton", "eager")], DEVICE, LIMITS)
    for mode in MODES:
        for name in ("triton", "eager"):
            times, row = comparison.row(name, mode)
            assert len(times.device) >= 5
            assert row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
            assert row["error"] < 1e-2
            assert (row["provider"], row["mode"], row["suite"]) == (name, mode, case.suite)
            assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"]["median"])
            assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"]["median"])
            assert row["copy_share"] == pytest.approx(row["bytes_per_second"] / 1e12)


def test_the_compiled_reference_is_measured_too():
    comparison = Comparison(NORM, [PROVIDERS["layer_norm"]["eager compiled"]], DEVICE, LIMITS)
    _, row = comparison.row("eager compiled", "both")
    assert row["error"] < 1e-5


def test_a_wrong_result_has_no_speed():
    def off_by_a_percent(x, weight, bias):
        return 1.01 * reference.layer_norm(x, weight, bias)

    comparison = compare(NORM, peer=off_by_a_percent, eager=reference.layer_norm)
    with pytest.raises(WrongResultError, match=r"the result is wrong: relative error 1\.00e-02, accepted 1e-04"):
        comparison.row("peer", "forward")
    with pytest.raises(WrongResultError):
        comparison.row("peer", "both")
    assert comparison.row("eager", "forward")[1]["provider"] == "eager"


def test_a_wrong_gradient_has_no_speed_in_any_mode():
    def detached_mean(x, weight, bias):
        mean = x.mean(-1, keepdim=True).detach()
        return (x - mean) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * weight + bias

    with pytest.raises(WrongResultError, match="the gradient of x is wrong"):
        compare(NORM, peer=detached_mean).row("peer", "forward")


def test_a_wrong_gradient_is_found_where_the_backward_is_no_pass_of_its_own():
    def detached_weight(x, weight):
        return PROVIDERS["linear_cross_entropy"]["eager"].build(case)(x, weight.detach()) + 0.0 * weight.sum()

    case = operator_cases.linear_cross_entropy(40, 16, 50, torch.float32)
    peer = Provider("peer", lambda case: detached_weight, modes=("forward", "both"))
    with pytest.raises(WrongResultError, match="the gradient of w_head is wrong"):
        Comparison(case, [peer], DEVICE, LIMITS).row("peer", "both")


def test_each_of_several_results_is_checked():
    def forget_the_sum(x, residual, weight, bias):
        y, _ = reference.add_layer_norm(x, residual, weight, bias)
        return y, x

    with pytest.raises(WrongResultError, match="the result is wrong"):
        compare(SMALL[2], peer=forget_the_sum).row("peer", "forward")


def test_not_a_number_is_wrong():
    def nan(x, weight, bias):
        return reference.layer_norm(x, weight, bias) * math.nan

    with pytest.raises(WrongResultError, match="relative error nan"):
        compare(NORM, peer=nan).row("peer", "forward")


def test_a_wrong_row_is_seen_in_the_compared_part_of_attention():
    """Only the last head is compared; an operator that forgets the mask is wrong in every head."""

    def see_everything(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with pytest.raises(WrongResultError, match="the result is wrong"):
        compare(SMALL[3], peer=see_everything).row("peer", "forward")


def test_a_peer_that_breaks_is_a_reason_and_our_own_an_error():
    def broken(*_):
        raise RuntimeError("no kernel\nfor this")

    comparison = compare(NORM, peer=broken, triton=broken, eager=reference.layer_norm)
    with pytest.raises(UnavailableError, match=r"^RuntimeError: no kernel$"):
        comparison.row("peer", "forward")
    with pytest.raises(RuntimeError, match="no kernel"):
        comparison.row("triton", "forward")
    assert comparison.row("eager", "both")[1]["mode"] == "both"


def test_what_failed_holds_no_tensors():
    held = []

    def broken(x, weight, bias):
        y = x * weight
        held.append(weakref.ref(y))
        raise RuntimeError("no kernel")

    comparison = compare(NORM, triton=broken)
    assert isinstance(comparison.failures["triton"], RuntimeError)
    assert held[0]() is None


def test_out_of_memory_is_a_reason_for_anyone():
    def greedy(*_):
        raise torch.OutOfMemoryError("tried to allocate too much")

    comparison = compare(NORM, eager=greedy)
    with pytest.raises(UnavailableError, match="out of memory: tried to allocate too much"):
        comparison.row("eager", "forward")


def test_memory_that_runs_out_in_the_backward_leaves_the_forward():
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

    comparison = compare(NORM, peer=lambda *tensors: Greedy.apply(reference.layer_norm(*tensors)))
    with pytest.raises(UnavailableError, match="out of memory"):
        comparison.row("peer", "backward")
    assert comparison.row("peer", "forward")[1]["mode"] == "forward"


def test_a_pass_that_a_provider_does_not_have():
    forward_only = Provider("peer", lambda case: reference.layer_norm, modes=("forward",))
    comparison = Comparison(NORM, [forward_only], DEVICE, LIMITS)
    comparison.row("peer", "forward")
    with pytest.raises(UnavailableError, match="peer has no backward pass"):
        comparison.row("peer", "backward")


def test_without_a_matrix_rate_there_is_no_share():
    case = replace(NORM, dtype=torch.float16)
    _, row = Comparison(case, [PROVIDERS["layer_norm"]["eager"]], DEVICE, LIMITS).row("eager", "forward")
    assert row["matrix_share"] is None
    assert row["copy_share"] > 0


def test_attention_is_measured_in_the_models_layout():
    q, *_ = SMALL[3].inputs(DEVICE)
    assert q.shape == (2, 3, 40, 16)
    assert q.transpose(1, 2).is_contiguous()
