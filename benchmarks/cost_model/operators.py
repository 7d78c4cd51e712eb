"""FLOPs and bytes of every operator, in closed form: what a roofline needs.

Bytes are the least that the method must move through device memory: each tensor that one of its passes reads counts
once for that pass, each that it writes once. FLOPs are those of the matrix products; where an operator has none, of
its elementwise arithmetic. Attention counts the scores that the mask lets through, and its backward five products,
whatever an implementation computes a second time (Dao 2023, arXiv:2307.08691, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass

from gptfast.config import GPTConfig

_STATISTIC = 4  # bytes: statistics of rows, and scales, are kept in float32
_TOKEN = 8  # bytes of a token id


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
        """The roofline's bound (Williams et al. 2009): the slower of arithmetic and memory, the other one hidden."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def bound(self, flops_per_second: float, bytes_per_second: float) -> str:
        """Which of the two is the slower: "memory" or "arithmetic"."""
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
    elements, parameters = rows * width * itemsize, (2 if bias else 1) * width * itemsize
    statistics = 2 * rows * _STATISTIC
    # mean 1, centre 1, square and sum 2, scale 1, weight 1, bias 1
    inference = Cost((7 if bias else 6) * rows * width, 2 * elements + parameters)
    # normalise again 2, times weight 1, two row sums 3, dx 4, dweight 2, dbias 1
    backward = Cost((13 if bias else 12) * rows * width, 3 * elements + statistics + width * itemsize + parameters)
    return Passes(inference, inference + Cost(0, statistics), backward)


def add_layer_norm(
    rows: int, width: int, itemsize: int, bias: bool = True, residual_itemsize: int | None = None
) -> Passes:
    """Residual addition and layer norm in one pass: reads x and the residual, writes their sum and its norm.

    The backward reads the gradients of both results and the sum, and writes one gradient, which x and the residual
    share; two where the residual stream has another size than x and the norm.
    """
    norm, elements = layer_norm(rows, width, itemsize, bias), rows * width
    stream = residual_itemsize or itemsize
    added = Cost(elements, 2 * elements * stream)
    # reads dy, dh and h, writes the stream's gradient, and x's
    moved = elements * (itemsize + 3 * stream + (itemsize if stream != itemsize else 0))
    backward = Cost(norm.backward.flops + elements, norm.backward.bytes - 3 * elements * itemsize + moved)
    return Passes(norm.inference + added, norm.forward + added, backward)


def linear(rows: int, inputs: int, outputs: int, itemsize: int, bias: bool = True) -> Passes:
    """A product [rows, inputs] x [inputs, outputs] with the gradients of both."""
    x, weight, y = rows * inputs, inputs * outputs, rows * outputs
    b = outputs if bias else 0
    forward = Cost(2 * rows * weight, (x + weight + b + y) * itemsize)
    # dx reads dy and the weight, dweight reads dy and x
    backward = Cost(4 * rows * weight, (2 * y + 2 * weight + 2 * x + b) * itemsize)
    return Passes(forward, forward, backward)


def int8_linear(rows: int, inputs: int, outputs: int, itemsize: int) -> Passes:
    """A product [rows, inputs] x [inputs, outputs] with weights of 8 bits and a scale for each output; no backward."""
    moved = (rows * inputs + rows * outputs) * itemsize + inputs * outputs + outputs * _STATISTIC
    forward = Cost(2 * rows * inputs * outputs, moved)
    return Passes(forward, forward, Cost(0, 0))


def gelu_ffn(rows: int, width: int, hidden: int, itemsize: int, bias: bool = True) -> Passes:
    """The feed-forward with the activation in the epilogue of the first product; it keeps the pre-activation alone.

    The backward recomputes the activation in the epilogue of dy @ w_down, which writes it beside its gradient.
    """
    x, h, weight = rows * width, rows * hidden, width * hidden
    b = width + hidden if bias else 0
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
    # reads q, k, v, o, do and the log-sum-exp, writes dq, dk, dv
    backward = Cost(5 * product, 4 * q + 4 * k + lse)
    return Passes(inference, inference + Cost(0, lse), backward)


def linear_cross_entropy(
    rows: int, width: int, vocabulary: int, itemsize: int, weight_itemsize: int | None = None, chunks: int = 1
) -> Passes:
    """Cross-entropy of the logits of x [rows, width] and a weight [vocabulary, width], in `chunks` of rows.

    The training forward computes both gradients: the logits are written by their product, read by the kernel, which
    writes their gradient in place, and read by two products more; the weight's gradient is summed in float32 from chunk
    to chunk. The kernel's second look at a row is not counted: it comes from the cache. The backward multiplies by the
    upstream gradient.
    """
    x, weight, logits = rows * width, vocabulary * width, rows * vocabulary
    product = 2 * rows * vocabulary * width
    targets = rows * (_TOKEN + _STATISTIC)  # and losses
    inference = Cost(product, (x + chunks * weight + 2 * logits) * itemsize + targets)
    sums = (2 * chunks - 1) * weight * 4
    forward = Cost(3 * product, (3 * x + 2 * chunks * weight + 5 * logits) * itemsize + sums + targets)
    backward = Cost(0, 2 * x * itemsize + weight * (4 + (weight_itemsize or itemsize)))
    return Passes(inference, forward, backward)


def adamw(parameters: int) -> Cost:
    """One fused AdamW step in float32: reads weight, gradient and two moments, writes all but the gradient."""
    return Cost(12 * parameters, 7 * 4 * parameters)


def parameters(config: GPTConfig) -> int:
    """Number of parameters, tied ones counted once."""
    width, bias = config.n_embd, config.bias
    norm = width * (2 if bias else 1)
    block = 12 * width**2 + 2 * norm
    block += 3 * width if config.has_qkv_bias else 0
    block += (width + 4 * width + width) if bias else 0  # attention's projection and both layers of the feed-forward
    count = config.n_layer * block + config.vocab_size * width * (1 if config.tie_weights else 2)
    count += config.block_size * width if config.position == "learned" else 0
    return count + (norm if config.norm_position == "pre" else 0)


def decode_bytes(config: GPTConfig, batch: int, context: int, itemsize: int, int8_weights: bool = False) -> int:
    """Bytes that generating one token for each of `batch` sequences must read: the weights once, and the keys and
    values of `context` earlier tokens of each sequence. Embedding rows are too few to count, and of weights of 8 bits
    so are scales, biases and norms, a byte each here.
    """
    looked_up = config.block_size * config.n_embd if config.position == "learned" else 0
    looked_up += 0 if config.tie_weights else config.vocab_size * config.n_embd
    cache = 2 * batch * config.n_layer * config.n_embd * context
    return (parameters(config) - looked_up) * (1 if int8_weights else itemsize) + cache * itemsize
