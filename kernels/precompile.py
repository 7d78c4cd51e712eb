"""What has to happen once for a model's kernels, done before training instead of in its first steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

import kernels
from kernels import runtime


class ModelShape(Protocol):
    """What the kernels need to know of a model: these fields of a `gptfast.GPTConfig`, or of anything that has them."""

    block_size: int
    vocab_size: int
    n_head: int
    n_embd: int
    bias: bool
    dropout: float

    @property
    def activation(self) -> str: ...

    @property
    def norm_position(self) -> str: ...

    @property
    def padded_vocab_size(self) -> int: ...

    @property
    def has_qkv_bias(self) -> bool: ...


# a tile of products with int8 weights holds 16, 32 or 64; Triton compiles for multiples of 16, for others, and for 1
_INT8_ROWS = (1, 2, 16, 17, 32, 33, 64)
# tokens that are read at once with a draft of the usual four proposals: by it, and by the larger model
_SPECULATIVE = (2, 5)


def warmup(
    config: ModelShape,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    batch_size: int = 1,
    autotune: bool = False,
    residual_dtype: torch.dtype | None = None,
    int8: bool = False,
) -> None:
    """Compile every kernel that a model's training and generation launch, and measure configurations if asked to.

    Triton compiles a kernel when it first runs, and keeps the result on disk; this call takes those pauses, or those
    of tuning, out of the first steps. Under `torch.autocast` it prepares what autocast makes of the operators.

    Args:
        config: the model's shape, a `gptfast.GPTConfig` for instance.
        dtype: of the model's parameters.
        device: where it will run.
        batch_size: sequences of `config.block_size` tokens in a batch. The kernels are the same for most sizes; what
            is measured is measured at this one.
        autotune: try the candidate configurations of each kernel and keep the fastest one, in memory and on disk; see
            `kernels.tuning`.
        residual_dtype: of the residual stream, where it is not that of the parameters.
        int8: also the products of a model whose weights `gptfast.quantize` has made integers.

    Raises:
        ValueError: Triton cannot run there; the message names the reason.
        TypeError: a dtype that the kernels do not compute in.
    """
    device = torch.device(device)
    if dtype not in runtime.DTYPES:
        raise TypeError(f"warmup: dtype must be float32, float16 or bfloat16, got {dtype}")
    if batch_size < 1:
        raise ValueError(f"warmup: batch_size must be at least 1, got {batch_size}")
    reason = runtime.why_not(device)
    if reason is not None:
        raise ValueError(f"warmup: {reason}")
    from kernels import tuning  # imports Triton

    model = _Operators(config, dtype, device, residual_dtype)
    with tuning.autotune() if autotune else nullcontext():
        for dropout_p in {0.0, config.dropout}:
            model.train(batch_size, config.block_size, dropout_p)
        with torch.no_grad():
            # prompts have any length: Triton compiles for multiples of 16, for others, and for 1
            for length in (1, 16, 17, config.block_size):
                model.forward(batch_size, min(length, config.block_size), 0.0)
            model.decode(batch_size, config.block_size)
            if int8:
                model.int8()


class _Operators:
    """The operators of one transformer block, with parameters of their own, called as a model calls them."""

    def __init__(
        self, config: ModelShape, dtype: torch.dtype, device: torch.device, residual_dtype: torch.dtype | None
    ) -> None:
        width, hidden = config.n_embd, 4 * config.n_embd
        self.config, self.dtype, self.device = config, dtype, device
        self.residual_dtype = residual_dtype or dtype
        self.head = self._leaf(config.padded_vocab_size, width)
        self.norm = (self._leaf(width), self._leaf(width) if config.bias else None)
        self.ffn = (
            self._leaf(hidden, width),
            self._leaf(hidden) if config.bias else None,
            self._leaf(width, hidden),
            self._leaf(width) if config.bias else None,
        )

    def _leaf(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device).normal_(std=0.02).requires_grad_()

    def forward(self, batch: int, length: int, dropout_p: float) -> list[Tensor]:
        """The results of all operators on [batch, length] tokens."""
        config = self.config
        width, head_size = config.n_embd, config.n_embd // config.n_head
        products = runtime.autocast_dtype(self.device) or self.dtype  # what linear layers return
        stream = self._leaf(batch, length, width, dtype=self.residual_dtype)
        sublayer = self._leaf(batch, length, width, dtype=products)
        qkv = self._leaf(batch, length, 3, config.n_head, head_size, dtype=products)
        # norms before a product are in its dtype
        dtype = products if config.norm_position == "pre" else None
        y = kernels.layer_norm(stream, *self.norm, dtype=dtype)
        added, h = kernels.add_layer_norm(sublayer, stream, *self.norm, dropout_p=dropout_p, dtype=dtype)
        # the last norm of a model: nobody else reads its sum
        last, _ = kernels.add_layer_norm(sublayer, stream, *self.norm, dropout_p=dropout_p, dtype=dtype)
        hidden = kernels.gelu_ffn(added, *self.ffn, activation=config.activation)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, T, D] each
        targets = torch.zeros(batch, length, dtype=torch.int64, device=self.device)
        loss = kernels.linear_cross_entropy(last, self.head, targets, -1, vocab_size=config.vocab_size)
        return [y, h, last, hidden, kernels.causal_attention(q, k, v, dropout_p=dropout_p).transpose(1, 2), loss]

    def decode(self, batch: int, capacity: int) -> None:
        """Tokens of sequences over a cache for `capacity` of them."""
        heads, head_size = self.config.n_head, self.config.n_embd // self.config.n_head
        products = runtime.autocast_dtype(self.device) or self.dtype
        cache = self._leaf(batch, heads, capacity, head_size, dtype=products)

        def queries(length: int) -> Tensor:  # [B, H, T, D]
            qkv = self._leaf(batch, min(length, capacity), 3, heads, head_size, dtype=products)
            return qkv[:, :, 0].transpose(1, 2)

        lengths = torch.full((batch,), capacity, dtype=torch.int32, device=self.device)
        for length in (1, *_SPECULATIVE):
            kernels.decode_attention(queries(length), cache, cache, lengths)
        for length in (16, 17):  # parts of prompts
            q = queries(length)
            for seen in (q.shape[2], 32, 33, capacity):
                keys = cache[:, :, : max(q.shape[2], min(seen, capacity))]
                kernels.causal_attention(q, keys, keys)

    def int8(self) -> None:
        """Every linear layer with int8 weights, for as many rows as its kernels take."""
        config, width = self.config, self.config.n_embd
        products = runtime.autocast_dtype(self.device) or self.dtype
        layers = (  # outputs, inputs, whether there is a bias
            (3 * width, width, config.has_qkv_bias),
            (width, width, config.bias),
            (4 * width, width, config.bias),
            (width, 4 * width, config.bias),
            (config.padded_vocab_size, width, False),
        )
        for outputs, inputs, has_bias in layers:
            weight, scale = kernels.quantize_int8(self._leaf(outputs, inputs).detach())
            bias = self._leaf(outputs).detach() if has_bias else None
            for rows in _INT8_ROWS:
                kernels.int8_linear(self._leaf(rows, inputs, dtype=products), weight, scale, bias)

    def train(self, batch: int, length: int, dropout_p: float) -> None:
        with torch.enable_grad():
            results = self.forward(batch, length, dropout_p)
            torch.autograd.backward(results, [torch.randn_like(y) for y in results])
