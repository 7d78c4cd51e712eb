"""Cases, providers and benches of whole models with the same weights: training steps and generation."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cost_model import operators, thop_count
from benchmarks.cost_model.training_step import StepCost
from benchmarks.measuring.bench import (
    TOLERANCES,
    Bench,
    UnavailableError,
    WrongResultError,
    dtype_name,
    relative_error,
    require_close,
)
from benchmarks.measuring.timing import Call, Times, WallClock, interleave, peak_bytes
from gptfast import GPT, GPTConfig, TrainStep, flops, hardware
from gptfast.quantization import quantize
from kernels import runtime

MODES = {"training": "step", "generation": "generate"}  # the one pass of each suite
SECONDS = {"cpu": 6.0, "cuda": 3.0}  # measured for each case, all providers together


@dataclass(frozen=True)
class ModelCase:
    """A model's shape and its batch."""

    suite: str  # "training" or "generation"
    model: str  # name of the shape
    config: GPTConfig  # without dropout, whose random numbers differ in every implementation
    batch: int
    length: int  # tokens of each sequence, or of each prompt
    providers: tuple[str, ...] = ("triton", "eager")  # the ones to measure; compiling large models takes minutes
    new_tokens: int = 0
    dtype: torch.dtype = torch.float32  # of the weights when generating on a CPU

    @property
    def dims(self) -> dict[str, str | int]:
        dims: dict[str, str | int] = {"model": self.model, "B": self.batch, "T": self.length}
        return dims | ({"new": self.new_tokens} if self.new_tokens else {})

    def __str__(self) -> str:
        words = [self.model, *(f"{name}={value}" for name, value in self.dims.items() if name != "model")]
        return " ".join(words if self.dtype == torch.float32 else [*words, dtype_name(self.dtype)])

    def measurements(self) -> list[tuple[str, str]]:
        """The mode and the provider of each measurement."""
        return [(MODES[self.suite], name) for name in self.providers]


@dataclass(frozen=True)
class ModelProvider:
    """An implementation of GPT: `build(reference)` returns a model with the weights of `reference`.

    `build` raises UnavailableError if it cannot run here; `loss`, `logits` and `generate` call the model.
    """

    name: str
    build: Callable[[GPT], nn.Module]
    loss: Callable[[Any, Tensor, Tensor], Tensor] = lambda model, idx, targets: model(idx, targets)[1]
    logits: Callable[[Any, Tensor], Tensor] = lambda model, idx: model(idx)[0]
    generate: Callable[[Any, Tensor, int], Tensor] = lambda model, idx, count: model.generate(idx, count, temperature=0)
    captured: bool = False  # train by `gptfast.TrainStep` in CUDA graphs, else by a plain loop
    int8: bool = False  # the weights of products have 8 bits
    tolerance: float = 0.0  # accepted relative error of the logits, if it is above that of the dtype
    modes: tuple[str, ...] = tuple(MODES.values())


def twin(reference: GPT, backend: str) -> GPT:
    """Build a model with another backend on the same parameters: weights and gradients are shared."""
    with torch.device("meta"):
        model = GPT(reference.config)
    # a `state_dict` would copy a padded vocabulary
    model.load_state_dict(dict(reference.named_parameters(remove_duplicate=False)), assign=True)
    model.set_backend(backend)
    return model.train(reference.training)


def _ours(name: str) -> ModelProvider:
    """A provider by one of our backends; `name` is the backend, then "int8", "compiled", "captured" or two of them."""
    backend, *forms = name.split()

    def build(reference: GPT) -> nn.Module:
        device = reference.lm_head.weight.device
        if backend == "cpu" and device.type != "cpu":
            raise UnavailableError("the backend cpu is measured on a CPU")
        if backend == "triton":
            if device.type != "cuda":
                raise UnavailableError("Triton kernels are measured on a CUDA GPU, and none was found")
            if (reason := runtime.unsupported_reason(device)) is not None:
                raise UnavailableError(reason)
        model = twin(reference, backend)
        if "compiled" in forms:
            model.compile()
        return quantize(model) if "int8" in forms else model

    options: dict[str, Any] = {}
    if "int8" in forms:
        options = {"int8": True, "tolerance": 0.05}  # int8 weights change logits by a percent
    elif "compiled" in forms:
        options = {"generate": functools.partial(GPT.generate, temperature=0, compiled=True)}
    return ModelProvider(name, build, captured="captured" in forms, **options)


def _hugging_face(reference: GPT) -> nn.Module:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UnavailableError(f"transformers cannot be imported: {error}") from error
    config = reference.config
    if not config.bias or not config.tie_weights or config.norm_position != "pre" or config.position != "learned":
        raise UnavailableError("Hugging Face's GPT-2 needs biases, tied weights, pre-norm and learned positions")
    settings = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        # the fused form of "gelu_new", which takes five passes over memory
        activation_function="gelu_pytorch_tanh" if config.activation == "gelu_tanh" else config.activation,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    weight = reference.lm_head.weight
    with weight.device:
        model: Any = GPT2LMHeadModel(settings)
    model.to(weight.dtype)
    ours = reference.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Hugging Face stores projections as [in, out]
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            parameter.copy_(ours[name].t() if transposed else ours[name])
    return model.train(reference.training)


def _nanogpt(checkout: str | None, reference: GPT) -> nn.Module:
    if checkout is None:
        raise UnavailableError("nanoGPT is not a package: pass the folder of a checkout as --nanogpt")
    path = Path(checkout, "model.py")
    if not path.is_file():
        raise UnavailableError(f"--nanogpt {checkout} has no model.py; a checkout of nanoGPT is accepted")
    config, weight = reference.config, reference.lm_head.weight
    if config.activation == "relu":  # the two GELUs differ in the fourth digit
        raise UnavailableError("nanoGPT's activation is GELU")
    spec: Any = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {name: getattr(config, name) for name in module.GPTConfig.__dataclass_fields__}
    with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
        model = module.GPT(module.GPTConfig(**settings))
    model.load_state_dict(reference.state_dict(), strict=False)  # without the mask of old PyTorch
    return model.to(weight.device, weight.dtype).train(reference.training)


def providers(nanogpt: str | None) -> dict[str, ModelProvider]:
    """Return all providers by name; `nanogpt` is the folder of a checkout of nanoGPT."""
    ours = (
        "triton", "cpu", "eager", "triton captured", "triton compiled", "triton compiled captured", "eager compiled",
        "triton int8", "cpu int8", "eager int8",
    )  # fmt: skip
    built = [
        *map(_ours, ours),
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
            functools.partial(_nanogpt, nanogpt),
            generate=lambda model, idx, count: model.generate(idx, count, top_k=1),  # it has no greedy mode
        ),
    ]
    return {provider.name: provider for provider in built}


def reference_model(config: GPTConfig, device: torch.device, dtype: torch.dtype) -> GPT:
    """Build the eager model with random weights, the same on every run."""
    torch.manual_seed(0)
    with device:
        return GPT(config, backend="eager").to(dtype)


class ModelBench(Bench):
    """Base of the model benches: random weights and tokens, and wall-clock times."""

    gpu_weights: torch.dtype

    def set_up(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else self.case.dtype  # of the matrix products
        weights = self.gpu_weights if on_gpu else self.case.dtype
        self.reference = self.source = reference_model(self.case.config, self.device, weights)
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.case.batch, self.case.length + 1)
        tokens = torch.randint(self.case.config.vocab_size, shape, generator=generator, device=self.device)
        self.idx, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def time(self, calls: dict[tuple[str, str], Call]) -> dict[tuple[str, str], Times]:
        return interleave(calls, WallClock(self.device), SECONDS[self.device.type])  # gaps between launches count

    def close(self) -> None:
        del self.reference, self.source
        super().close()


class TrainingBench(ModelBench):
    """Steps of forward, backward, gradient clipping and AdamW: bf16 autocast on a GPU, float32 on a CPU."""

    gpu_weights = torch.float32

    def set_up(self) -> None:
        super().set_up()
        self.optimizer = make_optimizer(self.reference)
        self.expected = loss_and_norm(self.reference, self.reference(self.idx, self.targets)[1])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda")

    def check(self, provider: ModelProvider, built: nn.Module) -> float:
        with self.autocast():
            loss = provider.loss(built, self.idx, self.targets)
        error = ((loss_and_norm(built, loss) - self.expected) / self.expected).abs().max().item()
        require_close("the loss or the norm of its gradient", error, TOLERANCES[self.dtype])
        return error

    def prepare(self, name: str, mode: str) -> tuple[dict[str, Call], int | None]:
        provider, model = self.providers[name], self.ready[name]
        shared = next(model.parameters()) is next(self.reference.parameters())
        # a captured step makes its learning rate a tensor, so it needs another optimizer
        optimizer = self.optimizer if shared and not provider.captured else make_optimizer(model)
        captured = TrainStep(model, optimizer, grad_clip=1.0, dtype=self.dtype) if provider.captured else None

        def step(_: None) -> None:
            if captured is not None:
                captured(self.idx, self.targets)
                return
            with self.autocast():
                loss = provider.loss(model, self.idx, self.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        call = Call(step)
        step(None)  # allocates the optimizer's moments
        peak = peak_bytes(call, self.device)
        step(None)  # CUDA graphs are captured at the third call; their memory is that of the step before
        state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
        persistent = sum(tensor.nbytes for tensor in [*model.parameters(), *state] if isinstance(tensor, Tensor))
        return {"whole": call}, None if peak is None else peak + persistent

    @functools.cached_property
    def _flops_by_thop(self) -> int | None:
        """Training FLOPs per token, three times thop's count of the forward; None if thop is not installed."""
        with contextlib.suppress(ImportError):
            return 3 * thop_count.count(self.reference, 1, self.case.length) // self.case.length
        return None

    def metrics(self, name: str, mode: str, seconds: dict[str, float]) -> dict[str, Any]:
        case, tokens = self.case, self.case.batch * self.case.length
        speed = tokens / seconds["whole"]
        per_token = flops.training_flops_per_token(case.config, case.length)
        causal = flops.training_flops_per_token(case.config, case.length, causal=True)
        peak = hardware.peak_flops(self.device, self.dtype)
        step = StepCost(case.config, case.batch, case.length, self.dtype.itemsize)
        matrix = self.limits["matrix_flops_per_second"][dtype_name(self.dtype)]
        return {
            "tokens_per_second": speed,
            "flops_per_token": per_token,
            "flops_per_token_causal": causal,
            "flops_per_token_thop": self._flops_by_thop,
            "mfu": flops.utilisation(per_token * speed, peak),
            "mfu_causal": flops.utilisation(causal * speed, peak),
            "flops": per_token * tokens,
            "bytes": sum(cost.bytes for cost in step.by_kind().values()),
            "flops_per_second": per_token * speed,
            "roofline_seconds": sum(step.seconds(matrix, self.limits["copy_bytes_per_second"]).values()),
        }


class GenerationBench(ModelBench):
    """Greedy continuations of a prompt: bf16 weights on a GPU, the case's dtype on a CPU."""

    gpu_weights = torch.bfloat16

    @torch.no_grad()
    def set_up(self) -> None:
        super().set_up()
        self.reference.eval()
        wide = reference_model(self.case.config, self.device, torch.float32).eval()
        wide.load_state_dict(self.reference.state_dict())
        self.expected = wide(self.idx)[0][:, -1]

    @torch.no_grad()
    def check(self, provider: ModelProvider, built: nn.Module) -> float:
        error = relative_error(provider.logits(built, self.idx)[:, -1], self.expected)
        require_close("the prompt's logits", error, max(TOLERANCES[self.dtype], provider.tolerance))
        return error

    def prepare(self, name: str, mode: str) -> tuple[dict[str, Call], int | None]:
        provider, model = self.providers[name], self.ready[name]

        def generate(count: int) -> None:
            written = provider.generate(model, self.idx, count).shape[1] - self.idx.shape[1]
            if written != count:
                raise WrongResultError(f"{name} generated {written} tokens instead of {count}")

        calls = {"first": Call(lambda _: generate(1)), "whole": Call(lambda _: generate(self.case.new_tokens))}
        peak = peak_bytes(calls["whole"], self.device)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        return calls, None if peak is None else peak + weights

    def metrics(self, name: str, mode: str, seconds: dict[str, float]) -> dict[str, Any]:
        case, config = self.case, self.case.config
        per_token = (seconds["whole"] - seconds["first"]) / (case.new_tokens - 1)
        context = case.length + case.new_tokens // 2  # the mean: it grows with every token
        int8 = self.providers[name].int8
        read = operators.decode_bytes(config, case.batch, context, self.dtype.itemsize, int8)
        return {
            "tokens_per_second": case.batch * case.new_tokens / seconds["whole"],
            "seconds_to_first_token": seconds["first"],
            "seconds_per_token": per_token,
            "bytes_per_token": read,
            "mbu": flops.utilisation(read / per_token, hardware.peak_bandwidth(self.device)),
        }


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Fused AdamW for every provider; its rate is too small to move the weights."""
    groups = [
        {"params": [p for p in model.parameters() if (p.dim() >= 2) is decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)


def loss_and_norm(model: nn.Module, loss: Tensor) -> Tensor:
    """Run the backward and return the loss and the norm of the gradient [2]; the gradient is dropped."""
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return torch.stack((loss.detach().float(), norm.float()))


BENCHES: dict[str, type[ModelBench]] = {"training": TrainingBench, "generation": GenerationBench}
