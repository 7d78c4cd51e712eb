"""GPT-2 and its relatives, with nanoGPT's names for fields, parameters and methods."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptfast import flops, hardware, optim
from gptfast.backend import Backend, Request, Switched, parse, resolve
from gptfast.checkpoint import nanogpt, vocab_padding
from gptfast.config import GPTConfig
from gptfast.generation import generate
from gptfast.generation.kv_cache import KVCache
from kernels import reference, runtime

IGNORED_TARGET = -1


class LayerNorm(Switched, nn.Module):
    """Layer norm over the last dimension, [..., C] -> [..., C], with an optional bias.

    Given a residual stream as well, x is added to it first, through dropout: the call returns the norm of the sum and
    the sum, in one pass over memory where the backend has one. What it returns for a matrix product is in the product's
    dtype, so that nobody casts it; what stays the residual stream is in that of the stream.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.dropout = config.dropout
        self.before_product = config.norm_position == "pre"

    @overload
    def forward(self, x: Tensor) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        dtype = (runtime.autocast_dtype(x.device) or self.weight.dtype) if self.before_product else None
        if residual is None:
            return self.backend.layer_norm(x, self.weight, self.bias, dtype=dtype)
        dropout = self.dropout if self.training else 0.0
        return self.backend.add_layer_norm(x, residual, self.weight, self.bias, dropout_p=dropout, dtype=dtype)


class CausalSelfAttention(Switched, nn.Module):
    """Multi-head causal self-attention, [B, T, C] -> [B, T, C].

    With a cache the T tokens follow those that are in it, whose keys and values they see and to which theirs are added.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        # query, key and value of all heads in one product
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.has_qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            y = self.backend.causal_attention_qkvpacked(qkv, dropout_p=dropout)  # [B, T, H, D]
            return self.c_proj(y.reshape(B, T, C))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, T, D] each
        k, v = cache.extend(self.layer, k, v)  # [B, H, S, D] each
        if (T == 1 or cache.lengths is not None) and dropout == 0.0:
            y = self.backend.decode_attention(q, k, v, cache.seen(T, x))
        else:
            seen = cache.length + T
            y = self.backend.causal_attention(q, k[:, :, :seen], v[:, :, :seen], dropout_p=dropout)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(Switched, nn.Module):
    """The feed-forward, [B, T, C] -> [B, T, C], four times as wide inside.

    `c_fc` and `c_proj` hold the weights alone: both products are one operator's, with either backend, so that forward
    hooks on these two modules never run. Hooks on the MLP itself do.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.gelu_ffn(
            x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, self.activation
        )

    def with_products(self, product: Callable[[nn.Linear, str | None], nn.Module | None]) -> nn.Module | None:
        """Return the feed-forward as two modules, one for each matrix product.

        Args:
            product: maps a linear layer and the activation behind it to a module, or to None to keep the layer.

        Returns:
            The modules `c_fc` and `c_proj` in sequence; None if `product` keeps either layer.
        """
        c_fc, c_proj = product(self.c_fc, self.activation), product(self.c_proj, None)
        if c_fc is None or c_proj is None:
            return None
        return nn.Sequential(OrderedDict(c_fc=c_fc, c_proj=c_proj))


class Block(nn.Module):
    """One transformer block, on a residual stream [B, T, C] and a sublayer's output that is yet to be added to it.

    The addition belongs to the norm that follows it, so that both are one pass: a block returns its last sublayer's
    output unadded. Norms after the sublayers take the addition with them, and leave nothing to be added.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)
        self.norm_position = config.norm_position

    def forward(
        self, x: Tensor, pending: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.norm_position == "post":
            x, _ = self.ln_1(self.attn(x, cache), x)
            x, _ = self.ln_2(self.mlp(x), x)
            return x, None
        if pending is None:
            y = self.ln_1(x)
        else:
            y, x = self.ln_1(pending, x)
        y, x = self.ln_2(self.attn(y, cache), x)
        return x, self.mlp(y)


class Transformer(nn.Module):
    """Everything below the output head: token ids [B, T] -> [B, T, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        # post-norm blocks end in a norm of their own
        self.ln_f = LayerNorm(config) if config.norm_position == "pre" else None
        self.sinusoidal = config.position == "sinusoidal"
        self.dropout = config.dropout
        self.checkpointing = False
        self.residual_dtype: torch.dtype | None = None

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.wte(idx)  # [B, T, C]
        T = idx.shape[1]
        # [T], or [B, T] of sequences that differ in length
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T, idx.device)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        elif self.sinusoidal:
            # the embedding is scaled to the size of the sinusoids: Vaswani et al. 2017, section 3.4
            x = x * math.sqrt(x.shape[-1]) + sinusoids(positions, x.shape[-1], x.dtype)
        x = self.drop(x)
        if self.residual_dtype is not None:
            x = x.to(self.residual_dtype)
        pending = None
        for block in self.h:
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x, pending = self._checkpointed(block, x, pending)
            else:
                x, pending = block(x, pending, cache)
        if cache is not None:
            cache.advance(idx.shape[1])
        return x if self.ln_f is None else self.ln_f(pending, x)[0]

    def _checkpointed(self, block: nn.Module, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A block that keeps its inputs alone, and runs a second time in the backward with the same dropout."""
        draws = self.training and self.dropout > 0.0
        if draws and x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "activation checkpointing draws dropout twice, which a CUDA graph cannot; use torch.compile, or "
                "dropout=0"
            )
        return checkpoint(block, x, pending, use_reentrant=False, preserve_rng_state=draws)


class GPT(nn.Module):
    """A GPT language model.

    The Triton loss takes the head's weight in the forward of the whole model: hooks on `lm_head` do not run in training
    then, and FSDP must not shard that layer apart from the model.

    Args:
        config: its shape.
        backend: "auto" (Triton where it can run, else eager), "triton", "eager", or a mapping from operator
            (`layer_norm`, `ffn`, `attention`, `loss`) to one of these; operators not named are "auto".

    Raises:
        ValueError: an unknown backend, or Triton asked for where it cannot run.
    """

    def __init__(self, config: GPTConfig, backend: Request = "auto") -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        self._init_weights()
        vocab_padding.hide(self)
        nanogpt.remember_activation(self)
        self.set_backend(backend)

    def _init_weights(self) -> None:
        """GPT-2's initialisation: normal weights, zero biases, residual projections scaled by 1/sqrt(2 n_layer)."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=std / math.sqrt(2 * self.config.n_layer))
        vocab_padding.clear(self)

    @property
    def backend(self) -> Backend:
        """The choice in force for each operator, `"triton"` or `"eager"`."""
        return self._backend

    def set_backend(self, backend: Request) -> None:
        """Choose the implementation of the operators anew; weights are untouched. Arguments and errors as `GPT`."""
        asked = parse(backend)
        self._install(resolve(asked, *self._placement(), self.config.head_size))
        self._asked = asked

    def _placement(self) -> tuple[torch.device, torch.dtype]:
        weight = self.transformer.wte.weight
        return weight.device, weight.dtype

    def _install(self, backend: Backend) -> None:
        self._backend = backend
        for module in self.modules():
            if isinstance(module, Switched):
                module.backend = backend

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """What `to`, `cuda`, `half` and the like go through: "auto" is decided anew for the new device and dtype."""
        super()._apply(fn, recurse)
        self._install(resolve(self._asked, *self._placement(), self.config.head_size))
        return self

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and, given targets, the mean cross-entropy.

        Args:
            idx: [B, T] int64 token ids, T at most `block_size`.
            targets: [B, T] int64, the token that follows each position; negative ones (nanoGPT's -1, PyTorch's -100)
                are left out of the loss.
            cache: keys and values of the tokens before `idx`, to which those of `idx` are added; together at most
                `block_size` tokens.

        Returns:
            Without targets logits [B, 1, V] of the last position, and None. With targets logits [B, T, V] and the loss
            in float32; in training mode, a backend whose "loss" is "triton" gives None for the logits: it never has
            them all.

        Raises:
            ValueError: a shape, length or token id out of range. On a GPU, ids are checked by PyTorch's own kernels,
                and targets that are out of range make the loss NaN.
        """
        self._check_tokens(idx, targets, 0 if cache is None else cache.length)
        x = self.transformer(idx, cache)  # [B, T, C]
        if targets is None:
            return self.logits(x[:, -1:]), None  # [B, 1, V]: generation needs no more
        targets = targets.clamp(min=IGNORED_TARGET)
        if self.backend["loss"] == "eager":
            logits = self.logits(x)  # [B, T, V]
            return logits, reference.cross_entropy(logits, targets, IGNORED_TARGET)
        loss = self.backend.linear_cross_entropy(
            x, self.lm_head.weight, targets, IGNORED_TARGET, vocab_size=self.config.vocab_size
        )
        return None if self.training else self.logits(x), loss

    def logits(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., V], without those of the padding."""
        logits = self.lm_head(x)
        padded = self.config.padded_vocab_size > self.config.vocab_size
        return logits[..., : self.config.vocab_size] if padded else logits

    def _check_tokens(self, idx: Tensor, targets: Tensor | None, before: int) -> None:
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx must be [B, T] with T >= 1, got shape {tuple(idx.shape)}")
        length = before + idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(
                f"a sequence of {length} tokens is longer than block_size={self.config.block_size}; crop it"
            )
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have the shape of idx, {tuple(idx.shape)}, got {tuple(targets.shape)}")
        # reading values on a GPU would stall it, and inside a compiled graph it would break the graph
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_range("token id", idx, lowest=0)
            if targets is not None:
                self._check_range("target", targets, lowest=None)
            reason = runtime.unsupported_reason(idx.device) if "triton" in self.backend.values() else None
            if reason is not None:
                raise ValueError(f"backend 'triton' cannot run: {reason}; move the model to a GPU or use 'auto'")

    def require_tokens(self, idx: Tensor) -> None:
        """Raise ValueError for token ids out of range; on a GPU PyTorch's own kernels find them."""
        if idx.device.type == "cpu":
            self._check_range("token id", idx, lowest=0)

    def _check_range(self, name: str, values: Tensor, lowest: int | None) -> None:
        if values.numel() == 0:
            return
        low, high = (int(bound) for bound in values.aminmax())
        if high >= self.config.vocab_size or (lowest is not None and low < lowest):
            wrong = high if high >= self.config.vocab_size else low
            raise ValueError(f"{name} {wrong} is out of range; accepted: 0 to {self.config.vocab_size - 1}")

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue each row of `idx`; see `gptfast.generation.generate`, also for the other settings."""
        return generate.generate(self, idx, max_new_tokens, temperature, top_k, generator, **settings)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) that decays matrices and embeddings alone.

        Args:
            weight_decay: for parameters with two or more dimensions; biases and norms get none.
            learning_rate: the initial learning rate.
            betas: of the two moment averages.
            device_type: nanoGPT's argument, "cuda" or "cpu"; the fused implementation serves both.
        """
        trained = [p for p in self.parameters() if p.requires_grad]
        return optim.adamw(trained, weight_decay, learning_rate, betas, device_type)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, tied ones counted once; by default without the position embedding, as nanoGPT's."""
        count = sum(p.numel() for p in self.parameters())
        padded = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        count -= padded * (1 if self.config.tie_weights else 2)
        if non_embedding and self.transformer.wpe is not None:
            count -= self.transformer.wpe.weight.numel()
        return count

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Model FLOPs utilisation: the share of the device's peak that training reached.

        Args:
            fwdbwd_per_iter: sequences of `block_size` tokens that went forward and backward.
            dt: the seconds that took.

        Returns:
            A fraction of the dense matrix peak (see `gptfast.hardware`; the work by PaLM's count, full attention, see
            `gptfast.flops`), on a GPU that for bfloat16, as nanoGPT counts; nan where that peak is not known.
        """
        device, dtype = self._placement()
        peak = hardware.peak_flops(device, torch.bfloat16 if device.type == "cuda" else dtype)
        speed = flops.tokens_per_second(fwdbwd_per_iter, self.config.block_size, dt)
        mfu = flops.utilisation(speed, flops.most_tokens_per_second(self.config, peak))
        return math.nan if mfu is None else mfu

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the longest sequence to `block_size`, dropping the positions beyond it.

        Raises:
            ValueError: `block_size` is below 1 or above the present one.
        """
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size must be in [1, {self.config.block_size}], got {block_size}")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        if self.transformer.wpe is not None:
            rows = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(rows, freeze=False)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Keep the inputs of each block alone for the backward, which runs the block a second time (Chen et al. 2016,
        arXiv:1604.06174): less memory for a third more of the blocks' arithmetic. The gradients are the same.
        """
        self.transformer.checkpointing = enabled

    def set_residual_dtype(self, dtype: torch.dtype | None) -> None:
        """Keep the residual stream in `dtype`, from the embedding to the last norm; None for that of the embedding.

        Under bfloat16 autocast a float32 model's stream is float32. In bfloat16 it is half the memory and traffic, as
        in llm.c, at the price of rounding every addition.

        Raises:
            ValueError: norms stand after the additions: their results are the stream, and round it themselves.
        """
        if dtype is not None and self.config.norm_position == "post":
            raise ValueError('a residual stream of its own dtype needs norm_position="pre", the model has "post"')
        self.transformer.residual_dtype = dtype

    @classmethod
    def from_pretrained(
        cls, model_type: str | Path, override_args: dict[str, float] | None = None, backend: Request = "auto"
    ) -> GPT:
        """A model from a folder or the Hugging Face hub; see `gptfast.huggingface.read.from_pretrained`."""
        from gptfast.huggingface.read import from_pretrained

        return from_pretrained(model_type, override_args, backend)

    @classmethod
    def from_nanogpt(
        cls, path: str | Path, override_args: Mapping[str, Any] | None = None, backend: Request = "auto"
    ) -> GPT:
        """The model of a checkpoint that nanoGPT's train.py has written; see `gptfast.checkpoint.nanogpt.load`."""
        return nanogpt.load(path, override_args, backend)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that Hugging Face's `transformers` loads; see `gptfast.huggingface.save.save`."""
        from gptfast.huggingface import save

        save.save(self, folder)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The position encoding of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5), [...] -> [..., width].

    Even columns are sin(t / 10000^(c / width)), odd ones the cosine of the same angle.
    """
    columns = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    frequency = torch.exp(columns * (-math.log(10000.0) / width))
    angle = positions[..., None].float() * frequency  # [..., width / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(dtype)
