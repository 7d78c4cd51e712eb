"""One optimizer step from a batch, with nothing in it that waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gptfast import devices

_WARMUP = 2  # steps before a capture: compilation, memory and the optimizer's state settle in them


class StepResult:
    """What a step measured. Reading it waits for that step alone, not for those started since.

    Attributes:
        loss: the mean over the batch, in nats per token, before the update.
        grad_norm: the Euclidean norm of all gradients, before clipping.
    """

    def __init__(self, values: Tensor) -> None:
        # [2]; from a CUDA GPU to pinned memory, behind the step
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def _read(self, index: int) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._values[index])

    @property
    def loss(self) -> float:
        return self._read(0)

    @property
    def grad_norm(self) -> float:
        return self._read(1)


class TrainStep:
    """Forward, loss, backward, clipping and optimizer, for the last 20% that a plain PyTorch loop leaves.

        step = TrainStep(model, optimizer, grad_clip=1.0, dtype=torch.bfloat16)
        for idx, targets in batches:
            result = step(idx, targets)
            if previous is not None:
                log(previous.loss)  # one step late: the GPU is never idle
            previous = result

    Matrix products run in `dtype` by `torch.autocast`; parameters, gradients, the optimizer's state and the residual
    stream stay in the dtype of the parameters. On a GPU the first steps run as they are, then the step is captured in
    CUDA graphs, one for each batch shape, and replayed: the host does nothing but start them. Dropout draws anew at
    each replay. The learning rate may change from step to step, by `group["lr"] = rate` or a scheduler, and is then a
    tensor; a change of the other settings of the optimizer, or of the model's mode, has the step captured again.

    With an optimizer of PyTorch's that is fused (AdamW and Adam with `fused=True`, as `GPT.configure_optimizers` makes
    it) clipping is part of its pass over the parameters, and a step whose gradients are not finite changes nothing.

    Args:
        model: `model(idx, targets)` returns (anything, mean loss): a GPT, or a module around one.
        optimizer: of its parameters.
        accumulation: parts, equal in size, in which a batch goes through the model; gradients and loss are those of
            the whole batch, whatever the number of targets that count in each part.
        grad_clip: the largest norm of the gradients; 0 turns clipping off.
        dtype: of matrix products: float32 or bfloat16.
        compiled: compile the model with `torch.compile(fullgraph=True)`.
        graph: capture the step in CUDA graphs; by default on GPUs, unless processes train together.

    Raises:
        ValueError: a setting out of range, or graphs asked for where there is no GPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        accumulation: int = 1,
        grad_clip: float = 0.0,
        dtype: torch.dtype = torch.float32,
        compiled: bool = False,
        graph: bool | None = None,
    ) -> None:
        self.device = next(model.parameters()).device
        on_gpu = self.device.type == "cuda"
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {accumulation}")
        if not 0.0 <= grad_clip < float("inf"):
            raise ValueError(f"grad_clip must be at least 0 and finite, got {grad_clip}")
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, which need no scaling of the loss, got {dtype}")
        if graph and not on_gpu:
            raise ValueError(f"graph=True needs a CUDA device, the model is on {self.device}")
        self.model, self.optimizer = model, optimizer
        self.accumulation, self.grad_clip, self.dtype = accumulation, grad_clip, dtype
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.graph = on_gpu and not together if graph is None else graph
        self._forward = torch.compile(model, fullgraph=True) if compiled else model
        # what GradScaler asks too: whether the step itself divides gradients, and skips those that are not finite
        self._scales = getattr(optimizer, "_step_supports_amp_scaling", False)
        self._graphs: dict[object, _Captured] = {}
        self._steps_before: dict[object, int] = {}
        self._rates: list[Tensor] = []
        if self.graph:
            self._capture_on(self.device)

    def __call__(self, idx: Tensor, targets: Tensor) -> StepResult:
        """Train on a batch.

        Args:
            idx: [B, T] int64 token ids, B a multiple of `accumulation`; on the model's device or, pinned at best, on
                the host.
            targets: [B, T] int64; negative ones do not count.

        Raises:
            ValueError: a batch that cannot be divided.
        """
        if idx.shape[0] % self.accumulation != 0:
            raise ValueError(
                f"a batch of {idx.shape[0]} sequences cannot be divided by accumulation={self.accumulation}"
            )
        parts = (self.accumulation, idx.shape[0] // self.accumulation)
        idx = idx.to(self.device, non_blocking=True).unflatten(0, parts)  # [A, B / A, T]
        targets = targets.to(self.device, non_blocking=True).unflatten(0, parts)  # [A, B / A, T]
        return StepResult(self._replay(idx, targets) if self.graph else self._run(idx, targets))

    def _capture_on(self, device: torch.device) -> None:
        self.graph, self._stream = True, torch.cuda.Stream(device)
        self._captures_update = all("capturable" in group for group in self.optimizer.param_groups)

    def _run(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Loss and norm, [2], step by step."""
        self.optimizer.zero_grad(set_to_none=True)
        weights = _weights(targets)
        losses = [self._gradients(*part) for part in zip(idx, targets, weights, strict=True)]
        norm = self._update()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([torch.stack(losses).sum(), norm])

    def _gradients(self, idx: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Add the gradients of a part of the batch; its share of the loss."""
        with devices.autocast(self.device, self.dtype):
            _, loss = self._forward(idx, targets)
        if self.accumulation > 1:  # where no target counts, the part's mean is not a number
            loss = torch.where(weight > 0.0, loss * weight, 0.0)
        loss.backward()
        return loss.detach().float()

    def _update(self) -> Tensor:
        """Clip, and step the optimizer; the norm of the gradients."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if not self._scales:
            if self.grad_clip > 0.0:
                clip_grads_with_norm_(parameters, self.grad_clip, norm)
            self.optimizer.step()
            return norm
        # `clip_grads_with_norm_`'s factor, as a divisor: the pass over the gradients that it would take is saved
        divisor = ((norm + 1e-6) / self.grad_clip).clamp(min=1.0) if self.grad_clip > 0.0 else torch.ones_like(norm)
        self.optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.grad_scale, self.optimizer.found_inf  # type: ignore[attr-defined]
        return norm

    def _replay(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Loss and norm, [2], by graphs that are captured when this kind of step has been taken a few times."""
        self._set_rates()
        key = (idx.shape, self.model.training, *map(_settings, self.optimizer.param_groups))
        before = self._steps_before.get(key, 0)
        self._steps_before[key] = before + 1
        if before < _WARMUP:
            # on a stream of its own, as captures are: what autograd remembers of streams fits then
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                outcome = self._run(idx, targets)
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            return outcome
        if key not in self._graphs:
            self._graphs[key] = self._capture(idx, targets)
        return self._graphs[key].replay(idx, targets, None if self._captures_update else self._update)

    def _set_rates(self) -> None:
        """Learning rates as tensors, which a graph reads anew at each replay."""
        if not self._captures_update:
            return
        groups = self.optimizer.param_groups
        if not self._rates:
            self._rates = [torch.empty((), device=self.device) for _ in groups]
            # a resumed optimizer may count its steps on the host
            for state in self.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"] = state["step"].to(self.device)
            # what PyTorch would warn of is what the first steps are for
            self.optimizer._warned_capturable_if_run_uncaptured = True
        for group, rate in zip(groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
                group["lr"] = rate
            group["capturable"] = True

    def _capture(self, idx: Tensor, targets: Tensor) -> _Captured:
        part, part_targets = idx[0].clone(), targets[0].clone()
        weight, total = _weights(targets)[0].clone(), torch.zeros((), device=self.device)
        outcome = torch.zeros(2, device=self.device)

        def first() -> None:
            self.optimizer.zero_grad(set_to_none=True)  # gradients are written, not added to zeros
            total.copy_(self._gradients(part, part_targets, weight))

        def more() -> None:
            total.add_(self._gradients(part, part_targets, weight))

        def update() -> None:
            outcome.copy_(torch.stack([total, self._update()]))

        pool = torch.cuda.graph_pool_handle()
        captured = _Captured(
            part, part_targets, weight, total, outcome,
            first=capture(first, pool, self._stream),
            more=capture(more, pool, self._stream) if self.accumulation > 1 else None,
            update=capture(update, pool, self._stream) if self._captures_update else None,
            gradients=[p.grad for group in self.optimizer.param_groups for p in group["params"]],
        )  # fmt: skip
        if self._captures_update:  # nobody else is to add to what the graphs write
            self.optimizer.zero_grad(set_to_none=True)
        return captured


@dataclass
class _Captured:
    """A step's graphs, and the tensors at whose addresses they read and write."""

    idx: Tensor  # [B / A, T]
    targets: Tensor  # [B / A, T]
    weight: Tensor
    total: Tensor  # the loss so far
    outcome: Tensor  # [2]
    first: Callable[[], None]
    more: Callable[[], None] | None
    update: Callable[[], None] | None
    gradients: list[Tensor | None]  # held, so that their memory stays the graphs'

    def replay(self, idx: Tensor, targets: Tensor, update: Callable[[], Tensor] | None) -> Tensor:
        """Loss and norm, [2]; `update` takes the place of the graph where the optimizer cannot be captured."""
        run = self.first
        for part in zip(idx, targets, _weights(targets), strict=True):
            for static, given in zip((self.idx, self.targets, self.weight), part, strict=True):
                static.copy_(given)
            run()
            run = self.more or run
        if update is not None:
            return torch.stack([self.total, update()])
        if self.update is not None:
            self.update()
        return self.outcome


def capture(function: Callable[[], None], pool: Any, stream: torch.cuda.Stream) -> Callable[[], None]:
    """Record the kernels that a function launches, without running them; the result launches them again."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph.replay


def _weights(targets: Tensor) -> Tensor:
    """The share of each part [A, B, T] in the targets that count, [A]."""
    counts = (targets >= 0).sum((1, 2))
    return counts / counts.sum()


def _settings(group: dict) -> tuple:
    """What a graph takes for given of a group's settings: all but the learning rate."""
    changing = ("params", "lr", "initial_lr", "capturable")
    return tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in group.items() if n not in changing)
