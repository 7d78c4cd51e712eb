"""The implementations that ours are measured against. Each is imported when it is built: none has to be installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from benchmarks.measuring.operator_bench import Case, Operator, Provider, UnavailableError
from benchmarks.measuring.operator_cases import full_lengths, scattered_targets
from kernels import runtime
from kernels.pytorch_internals import addmm_activation, int8pack_mm


def eager(case: Case) -> Operator:
    return case.reference


def compiled(case: Case) -> Operator:
    return torch.compile(case.reference, fullgraph=True, dynamic=False)


def triton(case: Case) -> Operator:
    _require_triton()
    return getattr(kernels, case.suite)


def _require_triton() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = runtime.unsupported_reason(device)
    if reason is not None:
        raise UnavailableError(reason)


OWN_PROVIDERS = [Provider("triton", triton), Provider("eager", eager), Provider("eager compiled", compiled)]


def _liger_layer_norm(case: Case) -> Operator:
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError as error:
        raise UnavailableError(f"liger-kernel cannot be imported: {error}") from error
    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def _liger_add_layer_norm(case: Case) -> Operator:
    """An addition and Liger's norm: fused with the addition it has an RMS norm alone."""
    norm = _liger_layer_norm(case)

    def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, weight, bias), h  # type: ignore[return-value]

    return add_and_norm


def _addmm_activation(case: Case) -> Operator:
    """CuBLASLt's own GELU epilogue, by tanh; it keeps nothing for a backward."""
    if not torch.cuda.is_available():
        raise UnavailableError("torch._addmm_activation computes GELU by tanh on CUDA alone")

    def ffn(x: Tensor, w_up: Tensor, b_up: Tensor, w_down: Tensor, b_down: Tensor) -> Tensor:
        hidden = addmm_activation(b_up, x, w_up.t(), use_gelu=True)
        return torch.addmm(b_down, hidden, w_down.t())

    return ffn


def _implementation(name: str) -> Callable[[Case], Operator]:
    """One of the feed-forward's implementations, whichever the operator itself would take."""

    def build(case: Case) -> Operator:
        return partial(triton(case), implementation=name)

    return build


def _triton_up(case: Case) -> Operator:
    """The fused product as `gelu_ffn` launches it."""
    _require_triton()
    from kernels.ffn import launch_up

    return lambda x, w_up, b_up: launch_up(x, w_up, b_up, "relu", save_z=False, implementation="fused")[0]


def _addmm_relu(case: Case) -> Operator:
    """CuBLASLt's product with its own ReLU epilogue."""
    return lambda x, w_up, b_up: addmm_activation(b_up, x, w_up.t(), use_gelu=False)


def _loss(case: Case) -> Operator:
    _require_triton()
    return lambda x, w_head: kernels.linear_cross_entropy(x, w_head, scattered_targets(x, case.dims["V"]))


def _liger_loss(case: Case) -> Operator:
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise UnavailableError(f"liger-kernel cannot be imported: {error}") from error
    return lambda x, w_head: LigerFusedLinearCrossEntropyFunction.apply(
        x, w_head, scattered_targets(x, case.dims["V"])
    )[0]


def _chunked_loss(case: Case) -> Operator:
    """PyTorch's own, in chunks of its choice."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"PyTorch {torch.__version__} has no linear_cross_entropy, 2.13 has")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, w_head: F.linear_cross_entropy(x, w_head, scattered_targets(x, case.dims["V"]), options=options)


def _decode(case: Case) -> Operator:
    _require_triton()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return partial(kernels.decode_attention, lengths=full_lengths(case.dims["B"], case.dims["S"], device))


def _int8(function: Callable[..., Tensor]) -> Operator:
    """A linear layer with weights of 8 bits, which are made once."""
    quantize = lru_cache(maxsize=1)(lambda weight: kernels.quantize_int8(weight.detach().float()))
    return lambda x, weight: function(x, *quantize(weight))


def _int8_triton(case: Case) -> Operator:
    _require_triton()
    return _int8(kernels.int8_linear)


def _int8_pytorch(case: Case) -> Operator:
    """PyTorch's own, for bfloat16 alone; its scales are in the dtype of x."""
    if case.dtype != torch.bfloat16:
        raise UnavailableError("torch._weight_int8pack_mm takes bfloat16 alone")
    return _int8(lambda x, q, scale: int8pack_mm(x, q, scale.to(x.dtype)))


def _sdpa_default(case: Case) -> Operator:
    """PyTorch's attention over the whole cache, which needs no mask: without lengths, so for full caches alone."""
    return F.scaled_dot_product_attention


def _sdpa(backend: SDPBackend) -> Callable[[Case], Operator]:
    """PyTorch's attention by one backend: left to itself it takes the first that fits, not the fastest."""

    def build(case: Case) -> Operator:
        if case.dtype == torch.float32:
            raise UnavailableError("takes float16 and bfloat16 alone")

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return attention

    return build


def _flex_attention(case: Case) -> Operator:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not torch.cuda.is_available():
        raise UnavailableError("FlexAttention has no backward on the CPU")
    length = case.dims["T"]
    mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, length, length, device="cuda")
    return partial(torch.compile(flex_attention, fullgraph=True, dynamic=False), block_mask=mask)


PROVIDERS = {
    suite: {provider.name: provider for provider in [*OWN_PROVIDERS, *others]}
    for suite, others in {
        "causal_attention": [
            Provider("SDPA FlashAttention-2", _sdpa(SDPBackend.FLASH_ATTENTION)),
            Provider("SDPA cuDNN", _sdpa(SDPBackend.CUDNN_ATTENTION)),
            Provider("FlexAttention", _flex_attention),
        ],
        "causal_attention_qkvpacked": [],
        "gelu_ffn": [
            Provider("triton fused", _implementation("fused")),
            Provider("triton unfused", _implementation("unfused")),
            Provider("_addmm_activation", _addmm_activation, modes=("forward",)),
        ],
        "layer_norm": [Provider("Liger-Kernel", _liger_layer_norm)],
        "add_layer_norm": [Provider("Liger-Kernel", _liger_add_layer_norm)],
    }.items()
} | {
    "decode_attention": {
        "triton": Provider("triton", _decode, modes=("forward",)),
        "eager": Provider("eager", eager, modes=("forward",)),
        "SDPA": Provider("SDPA", _sdpa_default, modes=("forward",)),
    },
    "int8_linear": {
        name: Provider(name, build, modes=("forward",))
        for name, build in {
            "triton": _int8_triton,
            "eager": lambda case: _int8(kernels.reference.int8_linear),
            "_weight_int8pack_mm": _int8_pytorch,
            "F.linear": lambda case: F.linear,  # of the weights before they were rounded: what 8 bits are for
        }.items()
    },
    # without gradients, and with both: the backward alone is a multiplication where the forward has done its work
    "linear_cross_entropy": {
        name: Provider(name, build, modes=("forward", "both"))
        for name, build in {
            "triton": _loss,
            "eager": eager,
            "eager compiled": compiled,
            "Liger-Kernel": _liger_loss,
            "PyTorch chunked": _chunked_loss,
        }.items()
    },
    "ffn_up": {
        "triton": Provider("triton", _triton_up, modes=("forward",)),
        "eager": Provider("eager", eager, modes=("forward",)),
        "_addmm_activation": Provider("_addmm_activation", _addmm_relu, modes=("forward",)),
    },
}
