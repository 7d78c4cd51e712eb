"""FLOPs and bytes of every operator in closed form, for the roofline.

Bytes are the least that the method must move through device memory: a tensor counts once for each pass that reads it,
and once for each that writes it. FLOPs are those of the matrix products, or of the elementwise arithmetic where there
are none. Attention counts the unmasked scores, and five products in its backward, whatever an implementation recomputes
(Dao 2023, arXiv:2307.08691, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from gptfast.config import GPTConfig

_STATISTIC = 4  # bytes of row statistics and scales in float32
_TOKEN = 8  # bytes of a token id
_WORKSPACE = 2**29  # bytes of logits that the loss holds at a time


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.flops * times, self.bytes * times)

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Compute the roofline's bound (Williams et al. 2009), the slower of arithmetic and memory."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def bound(self, flops_per_second: float, bytes_per_second: float) -> str:
        """Return the slower of the two, "memory" or "arithmetic"."""
        return "memory" if self.bytes / bytes_per_second >= self.flops / flops_per_second else "arithmetic"


@dataclass(frozen=True)
class Passes:
    """Cost of an operator without gradients, and of its forward and backward in training."""

    inference: Cost
    forward: Cost
    backward: Cost

    @property
    def training(self) -> Cost:
        return self.forward + self.backward


def layer_norm(rows: int, width: int, itemsize: int, bias: bool = True) -> Passes:
    """Layer norm of [rows, width] elements of `itemsize` bytes."""
    n, parameters, statistics = rows * width, (1 + bias) * width * itemsize, 2 * rows * _STATISTIC
    # mean 1, centre 1, square and sum 2, scale 1, weight 1, bias 1
    inference = Cost((6 + bias) * n, 2 * n * itemsize + parameters)
    # normalise again 2, times weight 1, two row sums 3, dx 4, dweight 2, dbias 1
    backward = Cost((12 + bias) * n, 3 * n * itemsize + statistics + width * itemsize + parameters)
    return Passes(inference, inference + Cost(0, statistics), backward)


def add_layer_norm(
    rows: int, width: int, itemsize: int, bias: bool = True, residual_itemsize: int | None = None
) -> Passes:
    """Residual addition and layer norm in one pass, which reads x and the residual and writes their sum and its norm.

    The backward reads the gradients of both results and the sum. It writes one gradient for x and the residual, or two
    if the residual stream has another itemsize than x and the norm.
    """
    norm, n, stream = layer_norm(rows, width, itemsize, bias), rows * width, residual_itemsize or itemsize
    added = Cost(n, 2 * n * stream)
    # reads dh, reads and writes in `stream` bytes what the norm does in `itemsize`, writes the gradient of x
    wider = 3 * stream - 2 * itemsize + (itemsize if stream != itemsize else 0)
    return Passes(norm.inference + added, norm.forward + added, norm.backward + Cost(n, n * wider))


def linear(rows: int, inputs: int, outputs: int, itemsize: int, bias: bool = True) -> Passes:
    """A product [rows, inputs] x [inputs, outputs] and the gradients of both."""
    x, weight, y, b = rows * inputs, inputs * outputs, rows * outputs, outputs * bias
    forward = Cost(2 * rows * weight, (x + weight + b + y) * itemsize)
    # dx reads dy and the weight, dweight reads dy and x
    backward = Cost(4 * rows * weight, (2 * y + 2 * weight + 2 * x + b) * itemsize)
    return Passes(forward, forward, backward)


def int8_linear(rows: int, inputs: int, outputs: int, itemsize: int) -> Passes:
    """A product [rows, inputs] x [inputs, outputs] with int8 weights and a scale per output, without a backward."""
    moved = rows * (inputs + outputs) * itemsize + inputs * outputs + outputs * _STATISTIC
    forward = Cost(2 * rows * inputs * outputs, moved)
    return Passes(forward, forward, Cost(0, 0))


def gelu_ffn(rows: int, width: int, hidden: int, itemsize: int, bias: bool = True) -> Passes:
    """The feed-forward with the activation in the epilogue of the first product, which keeps the pre-activation only.

    The backward recomputes the activation in the epilogue of dy @ w_down, and writes it beside its gradient.
    """
    x, h, weight, b = rows * width, rows * hidden, width * hidden, (width + hidden) * bias
    inference = Cost(4 * rows * weight, (2 * x + 2 * h + 2 * weight + b) * itemsize)
    forward = inference + Cost(0, h * itemsize)
    # four products: dh (reads dy, w_down, z; writes dz, h), dw_down (dy, h), dx (dz, w_up), dw_up (dz, x)
    backward = Cost(8 * rows * weight, (4 * x + 6 * h + 4 * weight + b) * itemsize)
    return Passes(inference, forward, backward)


def causal_attention(batch: int, heads: int, queries: int, keys: int, head_size: int, itemsize: int) -> Passes:
    """Attention of [batch, heads, queries, head_size] over `keys`, the causal mask aligned to the end."""
    seen = queries * keys - queries * (queries - 1) // 2
    product = 2 * batch * heads * seen * head_size
    q, k = batch * heads * queries * head_size * itemsize, batch * heads * keys * head_size * itemsize
    lse = batch * heads * queries * _STATISTIC
    inference = Cost(2 * product, 2 * q + 2 * k)
    # reads q, k, v, o, do and lse, writes dq, dk, dv
    backward = Cost(5 * product, 4 * q + 4 * k + lse)
    return Passes(inference, inference + Cost(0, lse), backward)


def linear_cross_entropy(
    rows: int, width: int, vocabulary: int, itemsize: int, weight_itemsize: int | None = None, chunks: int | None = None
) -> Passes:
    """Cross-entropy of the logits of x [rows, width] and a weight [vocabulary, width].

    Rows are processed in `chunks`, by default as many as the workspace for logits needs.

    The training forward computes both gradients. A product writes the logits, the kernel reads them and writes their
    gradient in place, two products read that; the weight's gradient is summed over chunks in float32. The kernel's
    second read of a row hits the cache and does not count. The backward multiplies by the upstream gradient.
    """
    x, weight, logits = rows * width, vocabulary * width, rows * vocabulary
    chunks = chunks or -(-logits * itemsize // _WORKSPACE)
    product = 2 * rows * vocabulary * width
    targets = rows * (_TOKEN + _STATISTIC)  # and losses
    inference = Cost(product, (x + chunks * weight + 2 * logits) * itemsize + targets)
    sums = (2 * chunks - 1) * weight * 4
    forward = Cost(3 * product, (3 * x + 2 * chunks * weight + 5 * logits) * itemsize + sums + targets)
    backward = Cost(0, 2 * x * itemsize + weight * (4 + (weight_itemsize or itemsize)))
    return Passes(inference, forward, backward)


def adamw(parameters: int) -> Cost:
    """One fused AdamW step in float32, which reads weight, gradient and two moments and writes all but the gradient."""
    return Cost(12 * parameters, 7 * 4 * parameters)


def parameters(config: GPTConfig) -> int:
    """Count the parameters of a GPT, tied ones once."""
    width, norm = config.n_embd, config.n_embd * (1 + config.bias)
    # attention's projection and both layers of the feed-forward have biases of 1, 4 and 1 widths
    block = 12 * width**2 + 2 * norm + 3 * width * config.has_qkv_bias + 6 * width * config.bias
    count = config.n_layer * block + config.vocab_size * width * (1 if config.tie_weights else 2)
    count += config.block_size * width * (config.position == "learned")
    return count + norm * (config.norm_position == "pre")


def decode_bytes(config: GPTConfig, batch: int, context: int, itemsize: int, int8_weights: bool = False) -> int:
    """Count the bytes that decoding one token of each sequence reads: the weights, and the cached keys and values.

    The cache holds `context` tokens of each sequence. Embedding rows are too few to count. With int8 weights, scales,
    biases and norms count as a byte each.
    """
    looked_up = config.block_size * config.n_embd if config.position == "learned" else 0
    looked_up += 0 if config.tie_weights else config.vocab_size * config.n_embd
    cache = 2 * batch * config.n_layer * config.n_embd * context
    return (parameters(config) - looked_up) * (1 if int8_weights else itemsize) + cache * itemsize
