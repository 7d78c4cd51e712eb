"""One model by several providers with the same weights: built, checked against the reference, then timed in turn."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cost_model import operators, thop_count
from benchmarks.cost_model.training_step import Step
from benchmarks.measuring import model_providers
from benchmarks.measuring.model_providers import ModelCase, ModelProvider
from benchmarks.measuring.operator_bench import WrongResultError, forget, noting, relative_error, require_close
from benchmarks.measuring.timing import Call, Times, peak_bytes, percentiles, step_times
from gptfast import TrainStep, flops, hardware

TRAINING_SECONDS = {"cpu": 6.0, "cuda": 3.0}  # measured for each case, all providers together


@dataclass
class ModelComparison:
    """What training and generation share. Subclasses say what is checked, what is timed and what the row holds."""

    case: ModelCase
    providers: list[ModelProvider]
    device: torch.device
    limits: Mapping[str, Any]
    failures: dict[str, Exception] = field(default_factory=dict)  # by provider
    _errors: dict[str, float] = field(default_factory=dict)
    _models: dict[str, nn.Module] = field(default_factory=dict)
    _measured: dict[str, dict[str, Any]] | None = None

    weights_on_gpu = torch.float32

    def __post_init__(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else self.case.dtype  # of the products
        weights = self.weights_on_gpu if on_gpu else self.case.dtype
        self._reference = model_providers.reference_model(self.case, self.device, weights)
        self._tokens = model_providers.tokens(self.case, self.device)
        self.prepare()
        truth = self.truth()
        for provider in self.providers:
            with noting(self.failures, provider.name):
                model = provider.build(self._reference)
                error = self.error(provider, model, truth)
                if error > provider.tolerance:
                    require_close(f"wrong {self.checked}", error, self.dtype)
                self._errors[provider.name], self._models[provider.name] = error, model

    checked = "result"

    def prepare(self) -> None: ...

    def truth(self) -> Any:
        raise NotImplementedError

    def error(self, provider: ModelProvider, model: nn.Module, truth: Any) -> float:
        raise NotImplementedError

    def measure(self) -> dict[str, dict[str, Any]]:
        """By provider: "times", and what else the row needs."""
        raise NotImplementedError

    def figures(self, measured: dict[str, Any]) -> dict[str, Any]:
        """The fields of the row that are the suite's own."""
        raise NotImplementedError

    def call(self, name: str, mode: str) -> Call:
        """What is timed of one provider. Raises what `Comparison.row` raises."""
        if name in self.failures:
            raise self.failures[name]
        return self.work(next(provider for provider in self.providers if provider.name == name))

    def work(self, provider: ModelProvider) -> Call:
        """A step, or a whole continuation."""
        raise NotImplementedError

    def row(self, name: str, mode: str) -> tuple[Times, dict[str, Any]]:
        """The times of one provider, and the row of the results. Raises what `Comparison.row` raises."""
        if self._measured is None:
            self._measured = self.measure()
        if name in self.failures:
            raise self.failures[name]
        measured = self._measured[name]
        return measured["times"], {
            "suite": self.case.suite,
            "case": str(self.case),
            "mode": mode,
            "provider": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "dims": dict(self.case.dims),
            "seconds": percentiles(measured["times"].device),
            "host_seconds": None,
            "error": self._errors[name],
            **self.figures(measured),
        }

    def close(self) -> None:
        """Give the memory back."""
        self._models.clear()
        del self._reference
        forget(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda")


class TrainingComparison(ModelComparison):
    """Steps of forward, backward, gradient clipping and AdamW: bf16 autocast on a GPU, float32 on a CPU."""

    checked = "loss or norm of its gradient"

    def prepare(self) -> None:
        self._idx, self._targets = self._tokens[:, :-1].contiguous(), self._tokens[:, 1:].contiguous()
        self._optimizer = self._optimizer_of(self._reference)

    def _optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        # every provider trains with the same optimizer, the fastest that PyTorch has; at this rate weights stay put
        return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)

    def _loss_and_norm(self, model: nn.Module, loss: Tensor) -> Tensor:
        """The loss and, after its backward, the norm of the gradient, which is dropped."""
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return torch.stack((loss.detach().float(), norm.float()))

    def truth(self) -> Tensor:
        """Loss and norm of the gradient, by eager PyTorch in float32."""
        return self._loss_and_norm(self._reference, self._reference(self._idx, self._targets)[1])

    def error(self, provider: ModelProvider, model: nn.Module, truth: Tensor) -> float:
        with self.autocast():
            loss = provider.loss(model, self._idx, self._targets)
        return ((self._loss_and_norm(model, loss) - truth) / truth).abs().max().item()

    def measure(self) -> dict[str, dict[str, Any]]:
        calls, memory = {}, {}
        for provider in self.providers:
            name = provider.name
            if name not in self.failures:
                with noting(self.failures, name):
                    step, persistent = self._step(provider, self._models[name])
                    step.run(None)  # the optimizer's moments come with the first step
                    peak = peak_bytes(step, self.device)
                    memory[name] = None if peak is None else peak + persistent()
                    step.run(None)  # the third is where graphs are captured, whose memory is the step's before
                    calls[name] = step
        times = step_times(calls, self.device, TRAINING_SECONDS[self.device.type]) if calls else {}
        return {name: {"times": times[name], "peak_bytes": memory[name]} for name in calls}

    def work(self, provider: ModelProvider) -> Call:
        return self._step(provider, self._models[provider.name])[0]

    def _step(self, provider: ModelProvider, model: nn.Module) -> tuple[Call, Any]:
        shared = next(model.parameters()) is next(self._reference.parameters())
        # a captured step's learning rate is a tensor: its optimizer is its own
        optimizer = self._optimizer if shared and not provider.captured else self._optimizer_of(model)

        def step(_: None) -> None:
            with self.autocast():
                loss = provider.loss(model, self._idx, self._targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def persistent() -> int:
            """Bytes of the weights and the optimizer's state, of this provider alone."""
            state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
            return sum(tensor.nbytes for tensor in [*model.parameters(), *state] if isinstance(tensor, Tensor))

        if provider.captured:
            captured = TrainStep(model, optimizer, grad_clip=1.0, dtype=self.dtype)
            return Call(lambda _: captured(self._idx, self._targets)), persistent
        return Call(step), persistent

    @functools.cached_property
    def _by_thop(self) -> int | None:
        """FLOPs per token as thop counts the forward, three times; None where thop is not installed."""
        case = self.case
        try:
            return (
                3 * thop_count.count(self._reference, case.batch, case.length).matrix_flops // case.batch // case.length
            )
        except ImportError:
            return None

    def figures(self, measured: dict[str, Any]) -> dict[str, Any]:
        case, seconds = self.case, percentiles(measured["times"].device)["median"]
        speed = case.batch * case.length / seconds
        per_token = flops.training_flops_per_token(case.config, case.length)
        causal = flops.training_flops_per_token(case.config, case.length, causal=True)
        peak = hardware.peak_flops(self.device, self.dtype)
        step = Step(case.config, case.batch, case.length, self.dtype.itemsize)
        matrix = self.limits["matrix_flops_per_second"][str(self.dtype).removeprefix("torch.")]
        copy = self.limits["copy_bytes_per_second"]
        return {
            "peak_bytes": measured["peak_bytes"],
            "tokens_per_second": speed,
            "flops_per_token": per_token,
            "flops_per_token_causal": causal,
            "flops_per_token_thop": self._by_thop,
            "mfu": flops.utilisation(per_token * speed, peak),
            "mfu_causal": flops.utilisation(causal * speed, peak),
            "flops": per_token * case.batch * case.length,
            "bytes": sum(cost.bytes for cost in step.by_kind().values()),
            "flops_per_second": per_token * speed,
            "roofline_seconds": sum(step.seconds(matrix, copy).values()),
        }


class GenerationComparison(ModelComparison):
    """Greedy continuation of a prompt: bf16 weights on a GPU, the case's on a CPU."""

    weights_on_gpu = torch.bfloat16
    checked = "logits of the prompt"

    def prepare(self) -> None:
        self._reference.eval()
        self._idx = self._tokens[:, :-1].contiguous()

    @torch.no_grad()
    def truth(self) -> Tensor:
        """Logits of the next token, by eager PyTorch in float32."""
        wider = model_providers.reference_model(self.case, self.device, torch.float32).eval()
        wider.load_state_dict(self._reference.state_dict())
        return wider(self._idx)[0][:, -1]

    @torch.no_grad()
    def error(self, provider: ModelProvider, model: nn.Module, truth: Tensor) -> float:
        return relative_error(provider.logits(model, self._idx)[:, -1], truth)

    def measure(self) -> dict[str, dict[str, Any]]:
        calls: dict[tuple[str, str], Call] = {}
        memory, int8 = {}, {}
        for provider in self.providers:
            name = provider.name
            if name not in self.failures:
                with noting(self.failures, name):
                    first, whole = self._call(provider, 1), self._call(provider, self.case.new_tokens)
                    peak = peak_bytes(whole, self.device)
                    model = self._models[name]
                    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
                    memory[name] = None if peak is None else peak + weights
                    int8[name] = provider.int8
                    calls |= {(name, "first"): first, (name, "whole"): whole}
        times = step_times(calls, self.device, TRAINING_SECONDS[self.device.type]) if calls else {}
        return {
            name: {
                "times": times[name, "whole"],
                "first": times[name, "first"],
                "peak_bytes": memory[name],
                "int8": int8[name],
            }
            for name in memory
        }

    def work(self, provider: ModelProvider) -> Call:
        return self._call(provider, self.case.new_tokens)

    def _call(self, provider: ModelProvider, count: int) -> Call:
        model = self._models[provider.name]

        def generate(_: None) -> None:
            written = provider.generate(model, self._idx, count).shape[1] - self._idx.shape[1]
            if written != count:
                raise WrongResultError(f"{written} tokens were written, {count} were asked for")

        return Call(generate)

    def figures(self, measured: dict[str, Any]) -> dict[str, Any]:
        case = self.case
        whole = percentiles(measured["times"].device)["median"]
        first = percentiles(measured["first"].device)["median"]
        per_token = (whole - first) / (case.new_tokens - 1)
        # the context grows from the prompt to the last token but one
        context = case.length + case.new_tokens // 2
        read = operators.decode_bytes(case.config, case.batch, context, self.dtype.itemsize, measured["int8"])
        return {
            "peak_bytes": measured["peak_bytes"],
            "tokens_per_second": case.batch * case.new_tokens / whole,
            "seconds_to_first_token": first,
            "seconds_per_token": per_token,
            "bytes_per_token": read,
            "mbu": flops.utilisation(read / per_token, hardware.peak_bandwidth(self.device)),
        }
