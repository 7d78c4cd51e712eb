"""GPT-2 and its relatives. Settings, parameters and methods have nanoGPT's names.

Shapes: B sequences, T tokens each, C channels, H heads of D = C / H channels, V vocabulary, S cached keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptfast import flops, hardware, huggingface, lora, optim
from gptfast.backend import IGNORE_INDEX, Backend, BackendModule, BackendSpec, parse_backend, resolve_backend
from gptfast.checkpoint import nanogpt, vocab_padding
from gptfast.checkpoint.atomic_files import require_fit
from gptfast.config import GPTConfig
from gptfast.generation import generate as generation
from gptfast.generation.kv_cache import KVCache
from gptfast.tokenizers import Tokenizer
from kernels import runtime


class LayerNorm(BackendModule):
    """Layer norm over the last dimension, [..., C] -> [..., C], with an optional bias.

    Given a residual stream, it first adds x to the stream through dropout, and returns the norm of the sum and the sum.
    Outputs that feed a matmul are produced in the matmul's dtype, which saves a cast; the stream keeps its own.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.dropout = config.dropout
        self.feeds_matmul = config.norm_position == "pre"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        dtype = (runtime.autocast_dtype(x.device) or self.weight.dtype) if self.feeds_matmul else None
        if residual is None:
            return self.backend.layer_norm(x, self.weight, self.bias, dtype=dtype)
        dropout = self.dropout if self.training else 0.0
        return self.backend.add_layer_norm(x, residual, self.weight, self.bias, dropout_p=dropout, dtype=dtype)


class CausalSelfAttention(BackendModule):
    """Multi-head causal self-attention, [B, T, C] -> [B, T, C].

    With a cache the T tokens follow the cached ones: they attend to them, and their keys and values are appended.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        # queries, keys and values of all heads in one matmul
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.has_qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # [B, T, 3, H, D]
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            # packed: the backward writes one gradient, without a split or a concatenation
            y = self.backend.causal_attention_qkvpacked(qkv, dropout_p=dropout)  # [B, T, H, D]
            return self.c_proj(y.reshape(B, T, C))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, T, D] each
        k, v = cache.extend(self.layer, k, v)  # [B, H, S, D] each
        if (T == 1 or cache.lengths is not None) and dropout == 0.0:
            y = self.backend.decode_attention(q, k, v, cache.kv_lengths(T, x))  # [B, H, T, D]
        else:
            seen = cache.length + T
            y = self.backend.causal_attention(q, k[:, :, :seen], v[:, :, :seen], dropout_p=dropout)  # [B, H, T, D]
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(BackendModule):
    """Feed-forward, [B, T, C] -> [B, T, C], with 4 C hidden channels.

    NOTE: hooks on c_fc and c_proj never run; the MLP hands their weights to one operator. Hooks on the MLP run.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.c_fc, self.c_proj
        return self.backend.gelu_ffn(x, up.weight, up.bias, down.weight, down.bias, self.activation)

    def with_products(self, product: Callable[[nn.Linear, str | None], nn.Module | None]) -> nn.Module | None:
        """Return the MLP as a sequence of `product(layer, activation after it)`, or None if either of these is None."""
        c_fc, c_proj = product(self.c_fc, self.activation), product(self.c_proj, None)
        if c_fc is None or c_proj is None:
            return None
        return nn.Sequential(OrderedDict(c_fc=c_fc, c_proj=c_proj))


class Block(nn.Module):
    """Transformer block on a residual stream x [B, T, C].

    The last sublayer's output is returned unadded (`pending`): the next norm adds it, in the same pass over memory.
    Post-norm blocks end with a norm and leave nothing pending.
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
        y, x = (self.ln_1(x), x) if pending is None else self.ln_1(pending, x)
        y, x = self.ln_2(self.attn(y, cache), x)
        return x, self.mlp(y)


class Transformer(nn.Module):
    """Embeddings, blocks and final norm: token ids [B, T] -> hidden states [B, T, C]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.position == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config) if config.norm_position == "pre" else None
        self.sinusoidal = config.position == "sinusoidal"
        self.dropout = config.dropout
        self.checkpointing = False
        self.residual_dtype: torch.dtype | None = None

    def forward(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        x = self.wte(idx)  # [B, T, C]
        T = idx.shape[1]
        # [T], or [B, T] if cached sequences differ in length
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions(T, idx.device)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        elif self.sinusoidal:
            # sqrt(C) brings the embedding to the size of the sinusoids: Vaswani et al. 2017, section 3.4
            x = x * math.sqrt(x.shape[-1]) + sinusoids(positions, x.shape[-1], x.dtype)
        x = self.drop(x).to(self.residual_dtype or x.dtype)
        pending = None
        for block in self.h:
            if self.checkpointing and cache is None and torch.is_grad_enabled():
                x, pending = self._checkpointed(block, x, pending)
            else:
                x, pending = block(x, pending, cache)
        if cache is not None:
            cache.advance(T)
        return x if self.ln_f is None else self.ln_f(pending, x)[0]

    def _checkpointed(self, block: nn.Module, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Run a block that keeps only its inputs. The backward runs it again, with the same dropout."""
        random = self.training and self.dropout > 0.0
        if random and x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            given = f"activation checkpointing cannot replay dropout={self.dropout} in a CUDA graph"
            raise ValueError(f"{given}; use torch.compile, or dropout=0")
        return checkpoint(block, x, pending, use_reentrant=False, preserve_rng_state=random)


class GPT(nn.Module):
    """GPT language model.

    NOTE: in training the Triton loss reads the weight of `lm_head`: hooks on that layer do not run, and FSDP must not
    shard it apart from the model.

    Args:
        config: the model's shape.
        backend: "triton", "cpu" (faster forms of PyTorch), "eager" (plain PyTorch), "auto" (Triton on GPUs where it can
            run, cpu on CPUs, else eager), or a mapping from operator (`layer_norm`, `ffn`, `attention`, `loss`) to one
            of these; operators that are not named get "auto".

    Raises:
        ValueError: an unknown backend, or "triton" or "cpu" where it cannot run.
    """

    def __init__(self, config: GPTConfig, backend: BackendSpec = "auto") -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight
        self._init_weights()
        vocab_padding.hide_in_state_dict(self)
        nanogpt.keep_activation_in_state_dict(self)
        self.set_backend(backend)

    def _init_weights(self) -> None:
        """Initialise as GPT-2: normal weights, zero biases, residual projections scaled by 1/sqrt(2 n_layer)."""
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
        with torch.no_grad():
            # padding stays zero: no token looks it up, and the loss sends it no gradient
            for weight in (self.transformer.wte.weight, self.lm_head.weight):
                weight[self.config.vocab_size :] = 0.0

    @property
    def backend(self) -> Backend:
        """Operators in use, and as a mapping the choice behind each: "triton", "cpu" or "eager"."""
        return self._backend

    def set_backend(self, backend: BackendSpec) -> None:
        """Change the implementation of the operators; weights are untouched. Arguments and errors as for `GPT`."""
        requested, weight = parse_backend(backend), self.transformer.wte.weight
        self._backend = resolve_backend(requested, weight.device, weight.dtype, self.config.head_size)
        self.requested_backend = requested  # "auto" is resolved again when the model moves
        for module in self.modules():
            if isinstance(module, BackendModule):
                module.backend = self._backend

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPT:
        """Move or cast the model, as `to` does, and resolve "auto" for the new device and dtype."""
        super()._apply(fn, recurse)
        self.set_backend(self.requested_backend)
        return self

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute logits and, given targets, the mean cross-entropy.

        Args:
            idx: [B, T] int64 token ids, T at most `block_size`.
            targets: [B, T] int64, the token after each position; the loss leaves out negative ones.
            cache: keys and values of the tokens before `idx`, to which those of `idx` are appended.

        Returns:
            Without targets, logits [B, 1, V] of the last position, and None. With targets, logits [B, T, V] and the
            loss in float32. In training mode the Triton loss gives None for the logits, which it never holds whole.

        Raises:
            ValueError: a shape, length or token id out of range. On a GPU PyTorch's kernels check token ids, and
                targets out of range make the loss NaN.
        """
        self._check_tokens(idx, targets, cached=0 if cache is None else cache.length)
        x = self.transformer(idx, cache)  # [B, T, C]
        if targets is None:
            return self.logits(x[:, -1:]), None  # [B, 1, V]: generation needs no more
        targets = targets.clamp(min=IGNORE_INDEX)
        return self.backend.loss(x, self.lm_head, targets, self.config.vocab_size, need_logits=not self.training)

    def logits(self, x: Tensor) -> Tensor:
        """Map hidden states [..., C] to logits [..., V]."""
        return self.backend.logits(x, self.lm_head, self.config.vocab_size)

    def _check_tokens(self, idx: Tensor, targets: Tensor | None, cached: int) -> None:
        if idx.dim() != 2 or idx.shape[1] == 0:
            raise ValueError(f"idx must be [B, T] with T >= 1, got shape {tuple(idx.shape)}")
        length = cached + idx.shape[1]
        if length > self.config.block_size:
            raise ValueError(f"{length} tokens are longer than block_size={self.config.block_size}; crop the sequence")
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets must have the shape of idx, {tuple(idx.shape)}, got {tuple(targets.shape)}")
        # reading values would synchronise a GPU, and break a compiled graph
        if idx.device.type == "cpu" and not torch.compiler.is_compiling():
            self.require_tokens(idx)
            if targets is not None:
                self.require_tokens(targets.clamp(min=0), "target")
            self.backend.require_device(idx.device)

    def require_tokens(self, idx: Tensor, name: str = "token id") -> None:
        """Raise ValueError for token ids out of range. On a GPU PyTorch's own kernels check them."""
        if idx.device.type == "cpu" and idx.numel() > 0:
            low, high = (int(bound) for bound in idx.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                wrong, last = low if low < 0 else high, self.config.vocab_size - 1
                raise ValueError(f"{name} {wrong} is out of range; accepted: 0 to {last}")

    generate = generation.generate

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str
    ) -> torch.optim.AdamW:
        """Build AdamW for the parameters that require gradients; biases and norms do not decay. See `optim.adamw`."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return optim.adamw(trained, weight_decay, learning_rate, betas, device_type)

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Count parameters, tied ones once; by default without the position embedding, as nanoGPT does."""
        count = sum(vocab_padding.unpad(self.config, name, p).numel() for name, p in self.named_parameters())
        if non_embedding and self.transformer.wpe is not None:
            count -= self.transformer.wpe.weight.numel()
        return count

    def estimate_mfu(self, fwdbwd_per_iter: float, dt: float) -> float:
        """Estimate the MFU of training on `fwdbwd_per_iter` sequences of `block_size` tokens in `dt` seconds.

        It is a fraction of the device's matmul peak (a GPU's in bfloat16), nan where that is unknown; see `flops`.
        """
        weight = self.transformer.wte.weight
        peak = hardware.peak_flops(weight.device, torch.bfloat16 if weight.is_cuda else weight.dtype)
        roofline = flops.roofline_tokens_per_second(self.config, peak)
        return math.nan if roofline is None else fwdbwd_per_iter * self.config.block_size / dt / roofline

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context to `block_size` tokens, dropping the positions beyond it.

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
        """Recompute each block in the backward (Chen et al. 2016, arXiv:1604.06174): less memory, equal gradients."""
        self.transformer.checkpointing = enabled

    def set_residual_dtype(self, dtype: torch.dtype | None) -> None:
        """Keep the residual stream in `dtype`, from the embedding to the last norm; None keeps the embedding's dtype.

        A bfloat16 stream under autocast halves its memory and traffic, as in llm.c, and rounds every addition.

        Raises:
            ValueError: a post-norm model, whose norms produce the stream.
        """
        if dtype is not None and self.config.norm_position == "post":
            raise ValueError(f'residual dtype {dtype} needs norm_position="pre", the model has "post"; use None')
        self.transformer.residual_dtype = dtype

    @classmethod
    def from_pretrained(
        cls, model_type: str | Path, override_args: Mapping[str, Any] | None = None, backend: BackendSpec = "auto"
    ) -> GPT:
        """Load a model in Hugging Face's layout, in float32; see `huggingface.read` for arguments and errors."""
        config, state_dict = huggingface.read(model_type, override_args)
        return cls.from_state_dict(config, state_dict, backend, f"{model_type} does not fit its config.json")

    @classmethod
    def from_nanogpt(
        cls, path: str | Path, override_args: Mapping[str, Any] | None = None, backend: BackendSpec = "auto"
    ) -> GPT:
        """Load a checkpoint of nanoGPT's train.py, in float32; see `nanogpt.read` for arguments and errors."""
        config, state_dict = nanogpt.read(path, override_args)
        return cls.from_state_dict(config, state_dict, backend, f"{path} does not fit its model_args")

    @classmethod
    def from_state_dict(
        cls, config: GPTConfig, state_dict: Mapping[str, Tensor], backend: BackendSpec = "auto", problem: str = ""
    ) -> GPT:
        """Build a model and load its weights.

        Raises:
            ValueError: a tensor is missing, unknown, misshapen or no float; the message begins with `problem`.
        """
        model = cls(config, backend)
        require_fit(problem or "the state dict does not fit the config", state_dict, model.state_dict())
        model.load_state_dict(state_dict)
        return model

    def save_pretrained(self, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a folder that `transformers` loads, with adapters merged; see `huggingface.save` for the errors."""
        state_dict = lora.merged_state_dict(self)
        with torch.device("meta"):
            plain = GPT(self.config, "eager").state_dict()
        require_fit("the model cannot be saved in Hugging Face's layout", state_dict, plain)
        huggingface.save(folder, self.config, state_dict, tokenizer)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Compute the position encoding of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5), [...] -> [..., width].

    Even columns are sin(t / 10000^(c / width)), odd ones the cosine of the same angle.
    """
    columns = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    frequency = torch.exp(columns * (-math.log(10000.0) / width))
    angle = positions[..., None].float() * frequency  # [..., width / 2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2).to(dtype)
