"""FLOPs of a GPT in closed form, and the speed that they allow."""

from __future__ import annotations

from gptfast.config import GPTConfig


def forward_flops_per_token(config: GPTConfig, length: int | None = None, causal: bool = False) -> int:
    """FLOPs of one forward pass per token: 2 for each weight of a matrix product, plus the attention scores.

    2 (12 L C^2 + C V) + 4 L C T, the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), which
    counts the full score matrix. Embedding look-ups, norms, activations and biases are not counted.

    Args:
        config: the model's shape.
        length: tokens per sequence T; `block_size` if None.
        causal: count only scores that the mask lets through, (T + 1) / 2 of T per token.
    """
    length = config.block_size if length is None else length
    weights = 12 * config.n_layer * config.n_embd**2 + config.n_embd * config.vocab_size
    keys_times_two = length + 1 if causal else 2 * length
    return 2 * weights + 2 * config.n_layer * config.n_embd * keys_times_two


def training_flops_per_token(config: GPTConfig, length: int | None = None, causal: bool = False) -> int:
    """FLOPs of forward and backward per token: three times the forward. Arguments as `forward_flops_per_token`."""
    return 3 * forward_flops_per_token(config, length, causal)


def tokens_per_second(batch: float, length: int, seconds: float) -> float:
    """The speed of `batch` sequences of `length` tokens in `seconds`."""
    return batch * length / seconds


def roofline_tokens_per_second(
    config: GPTConfig, peak: float | None, length: int | None = None, causal: bool = False
) -> float | None:
    """The speed of training that `peak` FLOP/s allow: one more token for each `training_flops_per_token` of them.

    What `utilisation` holds a speed in tokens per second against, for the MFU. None where the peak is not known. Other
    arguments as `forward_flops_per_token`.
    """
    return None if peak is None else peak / training_flops_per_token(config, length, causal)


def utilisation(rate: float, peak: float | None) -> float | None:
    """The share of `peak` that `rate` reached, both in the same unit; None where the peak is not known.

    Of model FLOPs per second, or of tokens per second beside the most that are possible, it is the MFU (Chowdhery et
    al. 2022), of bytes that had to be read per second the MBU.
    """
    return None if peak is None else rate / peak
