"""Whole models with the same weights from several providers, for the suites of training and generation."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gptfast
from benchmarks.measuring.bench import UnavailableError, dtype_name
from gptfast import GPT, GPTConfig
from gptfast.quantization import quantize
from kernels import runtime

MODES = {"training": "step", "generation": "generate"}  # the one pass of each suite


@dataclass(frozen=True)
class ModelCase:
    """A model's shape and its batch.

    Args:
        suite: "training" or "generation".
        model: name of the shape.
        config: the shape, without dropout, whose random numbers differ in every implementation.
        batch: sequences.
        length: tokens of each sequence, or of each prompt.
        providers: names of the providers to measure; compiling large models takes minutes.
        new_tokens: tokens to generate.
        dtype: of the weights when generating on a CPU.
    """

    suite: str
    model: str
    config: GPTConfig
    batch: int
    length: int
    providers: tuple[str, ...] = ("triton", "eager")
    new_tokens: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def dims(self) -> dict[str, str | int]:
        dims: dict[str, str | int] = {"model": self.model, "B": self.batch, "T": self.length}
        return dims | ({"new": self.new_tokens} if self.new_tokens else {})

    def __str__(self) -> str:
        words = [f"{name}={value}" if name != "model" else str(value) for name, value in self.dims.items()]
        return " ".join(words if self.dtype == torch.float32 else [*words, dtype_name(self.dtype)])

    @property
    def test_id(self) -> str:
        """The name in the form that pytest's `-k` selects."""
        return str(self).replace("=", "").replace(" ", "-")

    def measurements(self) -> list[tuple[str, str]]:
        """The mode and the provider of each measurement."""
        return [(MODES[self.suite], name) for name in self.providers]


@dataclass(frozen=True)
class ModelProvider:
    """An implementation of GPT: `build(reference)` returns a model with the weights of `reference`.

    Args:
        name: in results.
        build: raises UnavailableError if the implementation cannot run here.
        loss, logits, generate: the calls of the model's own interface.
        captured: train by `gptfast.TrainStep` in CUDA graphs, else by a plain loop.
        int8: the weights of products have 8 bits.
        tolerance: accepted relative error, where it is above that of the dtype.
    """

    name: str
    build: Callable[[GPT], nn.Module]
    loss: Callable[[Any, Tensor, Tensor], Tensor] = lambda model, idx, targets: model(idx, targets)[1]
    logits: Callable[[Any, Tensor], Tensor] = lambda model, idx: model(idx)[0]
    generate: Callable[[Any, Tensor, int], Tensor] = lambda model, idx, count: model.generate(idx, count, temperature=0)
    captured: bool = False
    int8: bool = False
    tolerance: float = 0.0
    modes: tuple[str, ...] = tuple(MODES.values())


def twin(reference: GPT, backend: str) -> GPT:
    """Build a model with another backend on the same parameters: weights and gradients are shared."""
    with torch.device("meta"):
        model = GPT(reference.config)
    # a `state_dict` would copy a padded vocabulary
    model.load_state_dict(dict(reference.named_parameters(remove_duplicate=False)), assign=True)
    model.set_backend(backend)
    return model.train(reference.training)


def _backend(name: str, quantized: bool = False, compiled: bool = False) -> Callable[[GPT], nn.Module]:
    """Build a twin by one of our backends, on the device that it is meant for."""

    def build(reference: GPT) -> nn.Module:
        device = reference.lm_head.weight.device
        if name == "cpu" and device.type != "cpu":
            raise UnavailableError("the backend cpu is measured on a CPU")
        if name == "triton" and device.type != "cuda":
            raise UnavailableError("Triton kernels are measured on a CUDA GPU, and none was found")
        reason = runtime.unsupported_reason(device) if name == "triton" else None
        if reason is not None:
            raise UnavailableError(reason)
        model = twin(reference, name)
        if compiled:
            model.compile()
        return quantize(model) if quantized else model

    return build


def _hugging_face(reference: GPT) -> nn.Module:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UnavailableError(f"transformers cannot be imported: {error}") from error
    config = reference.config
    if not config.bias or not config.tie_weights or config.norm_position != "pre" or config.position != "learned":
        raise UnavailableError("Hugging Face's GPT-2 needs biases, tied weights, pre-norm and learned positions")
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        # the fused form of "gelu_new", which takes five passes over memory
        "activation_function": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    weight = reference.lm_head.weight
    with torch.device(weight.device):
        model: Any = GPT2LMHeadModel(GPT2Config(**settings))
    model.to(weight.dtype)
    ours = reference.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Hugging Face stores projections as [in, out]
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            parameter.copy_(ours[name].t() if transposed else ours[name])
    return model.train(reference.training)


def _nanogpt(checkout: str | None) -> Callable[[GPT], nn.Module]:
    def build(reference: GPT) -> nn.Module:
        if checkout is None:
            raise UnavailableError("nanoGPT is not a package: pass the folder of a checkout as --nanogpt")
        path = Path(checkout, "model.py")
        if not path.is_file():
            raise UnavailableError(f"--nanogpt {checkout} has no model.py; a checkout of nanoGPT is accepted")
        spec = importlib.util.spec_from_file_location("nanogpt_model", path)
        if spec is None or spec.loader is None:
            raise UnavailableError(f"{path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = reference.config
        if config.activation == "relu":  # the two GELUs differ in the fourth digit
            raise UnavailableError("nanoGPT's activation is GELU")
        settings = {name: getattr(config, name) for name in module.GPTConfig.__dataclass_fields__}
        with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
            model = module.GPT(module.GPTConfig(**settings))
        model.load_state_dict(reference.state_dict(), strict=False)  # without the mask of old PyTorch
        weight = reference.lm_head.weight
        return model.to(weight.device, weight.dtype).train(reference.training)

    return build


def _generate_compiled(model: GPT, idx: Tensor, count: int) -> Tensor:
    return model.generate(idx, count, temperature=0, compiled=True)


def providers(nanogpt: str | None) -> dict[str, ModelProvider]:
    """Return all providers by name; `nanogpt` is the folder of a checkout of nanoGPT."""
    triton_compiled, eager_compiled = (_backend(name, compiled=True) for name in ("triton", "eager"))
    built = [
        *(ModelProvider(name, _backend(name)) for name in ("triton", "cpu", "eager")),
        ModelProvider("triton captured", _backend("triton"), captured=True),
        ModelProvider("triton compiled", triton_compiled, generate=_generate_compiled),
        ModelProvider("triton compiled captured", triton_compiled, captured=True),
        ModelProvider("eager compiled", eager_compiled, generate=_generate_compiled),
        *(
            # int8 weights change logits by a percent
            ModelProvider(f"{name} int8", _backend(name, quantized=True), int8=True, tolerance=0.05)
            for name in ("triton", "cpu", "eager")
        ),
        ModelProvider(
            "Hugging Face",
            _hugging_face,
            loss=lambda model, idx, targets: nn.functional.cross_entropy(
                model(idx, use_cache=False).logits.view(-1, model.config.vocab_size), targets.view(-1)
            ),
            logits=lambda model, idx: model(idx).logits,
            generate=lambda model, idx, count: model.generate(
                idx, attention_mask=torch.ones_like(idx), max_new_tokens=count, do_sample=False
            ),
        ),
        ModelProvider(
            "nanoGPT",
            _nanogpt(nanogpt),
            generate=lambda model, idx, count: model.generate(idx, count, top_k=1),  # it has no greedy mode
        ),
    ]
    return {provider.name: provider for provider in built}


def reference_model(case: ModelCase, device: torch.device, dtype: torch.dtype) -> GPT:
    """Build the eager model with random weights, the same on every run."""
    torch.manual_seed(0)
    with device:
        return gptfast.GPT(case.config, backend="eager").to(dtype)


def tokens(case: ModelCase, device: torch.device) -> Tensor:
    """Draw token ids [B, T + 1]: inputs, and targets one position later."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, case.length + 1)
    return torch.randint(case.config.vocab_size, shape, generator=generator, device=device)
