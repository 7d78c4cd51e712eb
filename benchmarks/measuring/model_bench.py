"""Whole models from several providers with the same weights: training steps and generation."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cost_model import operators, thop_count
from benchmarks.cost_model.training_step import StepCost
from benchmarks.measuring import model_providers
from benchmarks.measuring.bench import TOLERANCES, Bench, WrongResultError, dtype_name, relative_error, require_close
from benchmarks.measuring.model_providers import ModelProvider
from benchmarks.measuring.timing import Call, Times, peak_bytes, step_times
from gptfast import TrainStep, flops, hardware

SECONDS = {"cpu": 6.0, "cuda": 3.0}  # measured for each case, all providers together


class ModelBench(Bench):
    """Base of the model benches: random weights and tokens, and wall-clock times."""

    checked: str
    gpu_weights: torch.dtype

    def set_up(self) -> None:
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else self.case.dtype  # of the matrix products
        weights = self.gpu_weights if on_gpu else self.case.dtype
        self.reference = self.source = model_providers.reference_model(self.case, self.device, weights)
        self.tokens = model_providers.tokens(self.case, self.device)
        self.idx, self.targets = self.tokens[:, :-1].contiguous(), self.tokens[:, 1:].contiguous()

    def check(self, provider: ModelProvider, built: nn.Module) -> float:
        error = self.error(provider, built)
        require_close(self.checked, error, max(TOLERANCES[self.dtype], provider.tolerance))
        return error

    def error(self, provider: ModelProvider, model: nn.Module) -> float:
        """Return the relative error of what is checked."""
        raise NotImplementedError

    def time(self, calls: dict[tuple[str, str], Call]) -> dict[tuple[str, str], Times]:
        return step_times(calls, self.device, SECONDS[self.device.type])

    def close(self) -> None:
        del self.reference, self.source
        super().close()


class TrainingBench(ModelBench):
    """Steps of forward, backward, gradient clipping and AdamW: bf16 autocast on a GPU, float32 on a CPU."""

    checked = "the loss or the norm of its gradient"
    gpu_weights = torch.float32

    def set_up(self) -> None:
        super().set_up()
        self.optimizer = make_optimizer(self.reference)
        self.expected = loss_and_norm(self.reference, self.reference(self.idx, self.targets)[1])

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda")

    def error(self, provider: ModelProvider, model: nn.Module) -> float:
        with self.autocast():
            loss = provider.loss(model, self.idx, self.targets)
        return ((loss_and_norm(model, loss) - self.expected) / self.expected).abs().max().item()

    def prepare(self, name: str, mode: str) -> tuple[dict[str, Call], int | None]:
        model = self.ready[name]
        step, optimizer = self._step(self.providers[name], model)
        step.run(None)  # allocates the optimizer's moments
        peak = peak_bytes(step, self.device)
        step.run(None)  # CUDA graphs are captured at the third call; their memory is that of the step before
        state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
        persistent = sum(tensor.nbytes for tensor in [*model.parameters(), *state] if isinstance(tensor, Tensor))
        return {"whole": step}, None if peak is None else peak + persistent

    def _step(self, provider: ModelProvider, model: nn.Module) -> tuple[Call, torch.optim.Optimizer]:
        shared = next(model.parameters()) is next(self.reference.parameters())
        # a captured step makes its learning rate a tensor, so it needs an optimizer of its own
        optimizer = self.optimizer if shared and not provider.captured else make_optimizer(model)
        if provider.captured:
            captured = TrainStep(model, optimizer, grad_clip=1.0, dtype=self.dtype)
            return Call(lambda _: captured(self.idx, self.targets)), optimizer

        def step(_: None) -> None:
            with self.autocast():
                loss = provider.loss(model, self.idx, self.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Call(step), optimizer

    @functools.cached_property
    def _flops_by_thop(self) -> int | None:
        """Training FLOPs per token, three times thop's count of the forward; None if thop is not installed."""
        batch, length = self.case.batch, self.case.length
        try:
            return 3 * thop_count.count(self.reference, batch, length) // (batch * length)
        except ImportError:
            return None

    def metrics(self, name: str, mode: str, seconds: dict[str, float]) -> dict[str, Any]:
        case = self.case
        speed = case.batch * case.length / seconds["whole"]
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
            "flops": per_token * case.batch * case.length,
            "bytes": sum(cost.bytes for cost in step.by_kind().values()),
            "flops_per_second": per_token * speed,
            "roofline_seconds": sum(step.seconds(matrix, self.limits["copy_bytes_per_second"]).values()),
        }


class GenerationBench(ModelBench):
    """Greedy continuations of a prompt: bf16 weights on a GPU, the case's dtype on a CPU."""

    checked = "the prompt's logits"
    gpu_weights = torch.bfloat16

    @torch.no_grad()
    def set_up(self) -> None:
        super().set_up()
        self.reference.eval()
        wide = model_providers.reference_model(self.case, self.device, torch.float32).eval()
        wide.load_state_dict(self.reference.state_dict())
        self.expected = wide(self.idx)[0][:, -1]

    @torch.no_grad()
    def error(self, provider: ModelProvider, model: nn.Module) -> float:
        return relative_error(provider.logits(model, self.idx)[:, -1], self.expected)

    def prepare(self, name: str, mode: str) -> tuple[dict[str, Call], int | None]:
        model = self.ready[name]
        calls = {"first": self._call(name, 1), "whole": self._call(name, self.case.new_tokens)}
        peak = peak_bytes(calls["whole"], self.device)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        return calls, None if peak is None else peak + weights

    def _call(self, name: str, count: int) -> Call:
        provider, model = self.providers[name], self.ready[name]

        def generate(_: None) -> None:
            written = provider.generate(model, self.idx, count).shape[1] - self.idx.shape[1]
            if written != count:
                raise WrongResultError(f"{name} generated {written} tokens instead of {count}")

        return Call(generate)

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
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=True)


def loss_and_norm(model: nn.Module, loss: Tensor) -> Tensor:
    """Run the backward and return the loss and the norm of the gradient [2]; the gradient is dropped."""
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return torch.stack((loss.detach().float(), norm.float()))
