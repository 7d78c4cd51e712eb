"""One optimizer step, captured in CUDA graphs on a GPU. The host never waits for the device in it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from gptfast import cuda_graphs, devices
from gptfast.distributed import full_tensor, is_dtensor, to_local
from kernels.pytorch_internals import (
    foreach_div_,
    silence_capturable_warning,
    supports_grad_scale,
    update_grad_scale_,
)


class StepResult:
    """Measurements of one step. Reading one waits for that step only, not for later ones.

    Attributes:
        loss: mean over the batch in nats per token, before the update.
        grad_norm: Euclidean norm of all gradients, before clipping.
        loss_scale: factor of the loss in the backward, 1 except in float16.
    """

    def __init__(self, values: Tensor) -> None:
        # [3]; on a GPU an asynchronous copy to pinned memory, queued behind the step
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._copied = torch.cuda.Event() if values.is_cuda else None
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(values.device))

    @cached_property
    def _read(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()

    @property
    def loss(self) -> float:
        return self._read[0]

    @property
    def grad_norm(self) -> float:
        return self._read[1]

    @property
    def loss_scale(self) -> float:
        return self._read[2]


class TrainStep:
    """Forward, backward, gradient clipping and optimizer update.

        step = TrainStep(model, optimizer, grad_clip=1.0, dtype=torch.bfloat16)
        for idx, targets in batches:
            result = step(idx, targets)
            if previous is not None:
                log(previous.loss)  # one step late: the GPU never idles
            previous = result

    Matmuls run in `dtype` by `torch.autocast`; parameters, gradients, optimizer state and the residual stream keep the
    dtype of the parameters. On a GPU the first steps run eagerly. Then the step is captured in CUDA graphs, one set per
    batch shape, and replayed. Each replay draws new dropout masks. The learning rate may change between steps, by
    `group["lr"] = rate` or a scheduler, and becomes a tensor. The step is captured again when other hyperparameters or
    the model's mode change.

    With a fused optimizer of PyTorch (AdamW and Adam with `fused=True`, as in `GPT.configure_optimizers`) clipping is
    part of the optimizer's pass over the parameters, and a step with non-finite gradients changes nothing. In float16
    the loss is scaled and such a step halves the scale; with an optimizer that is not fused the host then waits for
    the gradients.

    Under `DistributedDataParallel` or FSDP2's `fully_shard` each process passes its rows of the batch. Gradients are
    synchronised once a step; loss, norm and weights are those of the whole batch.

    Args:
        model: `model(idx, targets)` returns (anything, mean loss): a GPT, or a module that wraps one.
        optimizer: of the model's parameters, or several optimizers of disjoint parameters.
        accumulation: number of equal micro-batches that a batch is split into. Gradients and loss are those of the
            whole batch, even if micro-batches differ in their numbers of targets that count.
        grad_clip: maximum norm of the gradients; 0 disables clipping.
        dtype: of matmuls: float32, bfloat16 or float16.
        compiled: compile the model with `torch.compile(fullgraph=True)`. Compile a model yourself before you wrap it.
        graph: capture the step in CUDA graphs; by default on GPUs, unless the model is distributed.

    Raises:
        ValueError: an argument out of range, graphs without a GPU, or `compiled` with a distributed model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        accumulation: int = 1,
        grad_clip: float = 0.0,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        graph: bool | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        distributed = _is_distributed(model)
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {accumulation}")
        if not 0.0 <= grad_clip < float("inf"):
            raise ValueError(f"grad_clip must be at least 0 and finite, got {grad_clip}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if graph and not cuda_graphs.is_available(self.device):
            raise ValueError(f"graph=True needs a CUDA device, the model is on {self.device}; use graph=False")
        if compiled and distributed:
            raise ValueError("compiled=True needs a model that is not distributed; compile the model, then wrap it")
        self.model = model
        self.optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self.accumulation, self.grad_clip, self.dtype = accumulation, grad_clip, dtype
        self.graph = cuda_graphs.is_available(self.device) and not distributed if graph is None else graph
        self._n_ranks = torch.distributed.get_world_size() if distributed else 1
        self._forward = torch.compile(model, fullgraph=True) if compiled else model
        self._loss_scale = _LossScale(self.device, enabled=dtype == torch.float16)

    def __call__(self, idx: Tensor, targets: Tensor) -> StepResult:
        """Train on a batch.

        Args:
            idx: [B, T] int64 token ids, B a multiple of `accumulation`; on the model's device or, preferably pinned,
                on the host.
            targets: [B, T] int64; negative targets do not count.

        Raises:
            ValueError: B is not a multiple of `accumulation`.
        """
        if idx.shape[0] % self.accumulation != 0:
            raise ValueError(
                f"a batch of {idx.shape[0]} sequences cannot be divided by accumulation={self.accumulation}"
            )
        shape = (self.accumulation, idx.shape[0] // self.accumulation, -1)
        idx = idx.to(self.device, non_blocking=True).reshape(shape)  # [A, B / A, T]
        targets = targets.to(self.device, non_blocking=True).reshape(shape)  # [A, B / A, T]
        return StepResult(self._captured(idx, targets) if self.graph else self._eager(idx, targets))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state besides model and optimizers: the loss scale of float16."""
        return self._loss_scale.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`; a dtype other than float16 ignores it."""
        self._loss_scale.load_state_dict(state)

    @cached_property
    def _captured(self) -> _CapturedStep:
        return _CapturedStep(self)  # built at the first call, after the optimizers have loaded their state

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _eager(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Run one step; return loss, norm and scale, [3]."""
        self._zero_grad()
        losses = []
        for number, micro_batch in enumerate(zip(idx, targets, self._weights(targets), strict=True)):
            with _gradient_sync(self.model, number == self.accumulation - 1):
                losses.append(self._backward(*micro_batch))
        loss = torch.stack(losses).sum()
        if self._n_ranks > 1:
            torch.distributed.all_reduce(loss)
        values = self._update(loss / self._n_ranks)
        self._zero_grad()
        return values

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _weights(self, targets: Tensor) -> Tensor:
        """Return each micro-batch's share [A] of the targets [A, B / A, T] that count on all ranks.

        The shares are multiplied by the number of ranks, because DDP and FSDP average gradients over ranks.
        """
        counts = (targets >= 0).sum((1, 2))
        total = counts.sum()
        if self._n_ranks > 1:
            torch.distributed.all_reduce(total)
        return counts / total * self._n_ranks

    def _backward(self, idx: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Accumulate the gradients of a micro-batch; return its weighted loss."""
        with devices.autocast(self.device, self.dtype):
            _, loss = self._forward(idx, targets)
        if self.accumulation * self._n_ranks > 1:  # the mean loss of a micro-batch without targets is NaN
            loss = torch.where(weight > 0.0, loss * weight, 0.0)
        self._loss_scale.apply(loss).backward()
        return loss.detach().float()

    def _update(self, loss: Tensor) -> Tensor:
        """Clip the gradients and step the optimizers; return loss, norm and scale, [3]."""
        gradients = [p.grad for group in self._groups for p in group["params"] if p.grad is not None]
        scale = self._loss_scale.value.clone()
        norm = full_tensor(get_total_norm(gradients)) / scale
        # the factor of `clip_grads_with_norm_` as a divisor, which saves a pass over the gradients
        divisor = ((norm + 1e-6) / self.grad_clip).clamp(min=1.0) if self.grad_clip > 0.0 else torch.ones_like(norm)
        not_finite = (~norm.isfinite()).float()
        for optimizer in self.optimizers:
            self._step_optimizer(optimizer, divisor * scale, not_finite)
        self._loss_scale.update(not_finite)
        return torch.stack([loss, norm, scale])

    def _step_optimizer(self, optimizer: Any, divisor: Tensor, not_finite: Tensor) -> None:
        """Divide the gradients and step, or skip the step in float16 where they are not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if supports_grad_scale(optimizer) and not any(map(is_dtensor, parameters)):
            optimizer.grad_scale, optimizer.found_inf = divisor, not_finite
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
            return
        if self._loss_scale.enabled and bool(not_finite):  # the host waits here
            return
        if self._loss_scale.enabled or self.grad_clip > 0.0:
            foreach_div_([to_local(p.grad) for p in parameters], divisor)
        optimizer.step()


class _LossScale:
    """Dynamic loss scale of float16 (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2).

    The scale keeps small gradients from being flushed to zero. As in `torch.amp.GradScaler` it halves at an overflow
    and doubles after 2000 steps without one. Unlike there, it stays on the device.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.enabled = enabled
        self.value = torch.full((), 2.0**16 if enabled else 1.0, device=device)
        self._growth_tracker = torch.zeros((), dtype=torch.int32, device=device)

    def apply(self, loss: Tensor) -> Tensor:
        return loss * self.value if self.enabled else loss

    def update(self, not_finite: Tensor) -> None:
        if self.enabled:
            update_grad_scale_(self.value, self._growth_tracker, not_finite, 2.0, 0.5, 2000)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.value.clone(), "grown": self._growth_tracker.clone()} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.enabled and state:
            self.value.copy_(state["scale"])
            self._growth_tracker.copy_(state["grown"])


class _CapturedStep:
    """A step that runs eagerly a few times, then from CUDA graphs: a set of them for each shape and setting."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self._calls: Counter[object] = Counter()
        self._graphs: dict[object, _StepGraphs] = {}
        # in float16 the host decides whether to skip the step of an optimizer that is not fused; a graph cannot
        host_waits = step._loss_scale.enabled and not all(map(supports_grad_scale, step.optimizers))
        self._captures_update = not host_waits and all("capturable" in group for group in step._groups)
        self._rates = [torch.empty((), device=step.device) for _ in step._groups]
        if self._captures_update:
            for optimizer in step.optimizers:
                for state in optimizer.state.values():
                    if isinstance(state.get("step"), Tensor):  # on the host after a resume
                        state["step"] = state["step"].to(step.device)
                silence_capturable_warning(optimizer)  # the warm-up steps are meant to run uncaptured

    def __call__(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Run one step; return loss, norm and scale, [3]."""
        step = self._step
        if self._captures_update:
            self._set_rates()
        key = (idx.shape, step.model.training, *map(_captured_settings, step._groups))
        self._calls[key] += 1
        if self._calls[key] <= cuda_graphs.WARMUP_CALLS:
            with cuda_graphs.on_capture_stream(step.device):
                return step._eager(idx, targets)
        if key not in self._graphs:
            self._graphs[key] = _StepGraphs(step, idx, targets, self._captures_update)
        return self._graphs[key].replay(idx, targets)

    def _set_rates(self) -> None:
        """Copy learning rates to tensors, which each replay reads."""
        for group, rate in zip(self._step._groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
                group["lr"] = rate
            group["capturable"] = True


class _StepGraphs:
    """The CUDA graphs of a step with one batch shape, and the static tensors that they read and write."""

    def __init__(self, step: TrainStep, idx: Tensor, targets: Tensor, captures_update: bool) -> None:
        self._step = step
        self._inputs = (idx[0].clone(), targets[0].clone(), step._weights(targets)[0].clone())
        self._loss = torch.zeros((), device=step.device)
        self._values = torch.zeros(3, device=step.device)  # loss, norm and scale

        def first_backward() -> None:
            step._zero_grad()  # gradients are written, instead of added to zeros
            self._loss.copy_(step._backward(*self._inputs))

        def next_backward() -> None:
            self._loss.add_(step._backward(*self._inputs))

        def update() -> None:
            self._values.copy_(step._update(self._loss))

        functions = [first_backward, next_backward] if step.accumulation > 1 else [first_backward]
        graphs = cuda_graphs.capture([*functions, update] if captures_update else functions, step.device)
        self._update = graphs.pop() if captures_update else None
        self._backward = [graphs[0], *graphs[1:] * (step.accumulation - 1)]  # per micro-batch
        # holds the memory that the graphs write
        self._gradients = {p: p.grad for group in step._groups for p in group["params"]}
        if captures_update:
            step._zero_grad()  # an eager step must not add to that memory

    def replay(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Run one step; return loss, norm and scale, [3]."""
        micro_batches = zip(idx, targets, self._step._weights(targets), strict=True)
        for backward, micro_batch in zip(self._backward, micro_batches, strict=True):
            for static, given in zip(self._inputs, micro_batch, strict=True):
                static.copy_(given)
            backward()
        if self._update is not None:
            self._update()
            return self._values
        for parameter, gradient in self._gradients.items():  # graphs of other shapes have other gradients
            parameter.grad = gradient
        return self._step._update(self._loss)


def _captured_settings(group: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the hyperparameters of a parameter group that a graph holds as constants: all but the learning rate."""
    changing = ("params", "lr", "initial_lr", "capturable")
    return tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in group.items() if n not in changing)


def _is_distributed(model: nn.Module) -> bool:
    """Return True for a model wrapped by DDP or FSDP2."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule  # slow to import

    return isinstance(model, (nn.parallel.DistributedDataParallel, FSDPModule))


def _gradient_sync(model: Any, enabled: bool) -> AbstractContextManager:
    """Skip gradient synchronisation of DDP or FSDP2 unless `enabled`."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(enabled)
    return contextlib.nullcontext() if enabled or not hasattr(model, "no_sync") else model.no_sync()
