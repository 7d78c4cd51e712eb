"""FLOPs of a GPT in closed form, and the throughput that they allow."""

from __future__ import annotations

from gptfast.config import GPTConfig


def forward_flops_per_token(config: GPTConfig, length: int | None = None, causal: bool = False) -> int:
    """Count the FLOPs of a forward pass per token: 2 for each weight of a matmul, plus the attention scores.

    2 (12 L C^2 + C V) + 4 L C T, the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), which
    counts the full score matrix. Embedding lookups, norms, activations and biases are not counted.

    Args:
        config: the model's shape.
        length: tokens per sequence T; `block_size` if None.
        causal: count only unmasked scores, (T + 1) / 2 of T per token.
    """
    length = config.block_size if length is None else length
    weights = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size
    keys_times_two = length + 1 if causal else 2 * length
    return 2 * weights + 2 * config.n_layer * config.n_embd * keys_times_two


def training_flops_per_token(config: GPTConfig, length: int | None = None, causal: bool = False) -> int:
    """Count the FLOPs of forward and backward per token: three times the forward's. Arguments as above."""
    return 3 * forward_flops_per_token(config, length, causal)


def roofline_tokens_per_second(
    config: GPTConfig, peak: float | None, length: int | None = None, causal: bool = False
) -> float | None:
    """Compute the highest training throughput that `peak` FLOP/s allow, None where the peak is not known.

    `utilisation` of a throughput against it is the MFU. Other arguments as for `forward_flops_per_token`.
    """
    return None if peak is None else peak / training_flops_per_token(config, length, causal)


def utilisation(rate: float, peak: float | None) -> float | None:
    """Return rate / peak, both in the same unit; None where the peak is not known.

    It is the MFU (Chowdhery et al. 2022) for model FLOPs or tokens per second, and the MBU for bytes read per second.
    """
    return None if peak is None else rate / peak
