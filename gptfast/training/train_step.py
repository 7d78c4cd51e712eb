"""One optimizer step from a batch, with nothing in it that waits for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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

_WARMUP = 2  # steps before a capture: compilation, memory and the optimizer's state settle in them

# float16's loss is scaled up, so that small gradients are not lost: by `torch.amp.GradScaler`'s first factor, doubled
# after so many steps and halved whenever a gradient overflows (Micikevicius et al. 2017, arXiv:1710.03740, section 3.2)
_FIRST_SCALE, _GROWTH_INTERVAL = 2.0**16, 2000


class StepResult:
    """What a step measured. Reading it waits for that step alone, not for those started since.

    Attributes:
        loss: the mean over the batch, in nats per token, before the update.
        grad_norm: the Euclidean norm of all gradients, before clipping.
        loss_scale: what the loss was multiplied with for the backward: 1, but for float16.
    """

    def __init__(self, values: Tensor) -> None:
        # [3]; from a CUDA GPU to pinned memory, behind the step
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        self._arrived = torch.cuda.Event() if values.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(values.device))

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

    @property
    def loss_scale(self) -> float:
        return self._read(2)


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
    In float16 the loss is scaled, and such a step halves the scale; an optimizer that is not fused has the host wait
    for the gradients then.

    Processes that train together, by `DistributedDataParallel` or FSDP2's `fully_shard`, each take their rows of the
    batch. Gradients travel once a step; loss, norm and weights are those of the whole batch.

    Args:
        model: `model(idx, targets)` returns (anything, mean loss): a GPT, or a module around one.
        optimizer: of its parameters; or several, of parts of them.
        accumulation: parts, equal in size, in which a batch goes through the model; gradients and loss are those of
            the whole batch, whatever the number of targets that count in each part.
        grad_clip: the largest norm of the gradients; 0 turns clipping off.
        dtype: of matrix products: float32, bfloat16 or float16.
        compiled: compile the model with `torch.compile(fullgraph=True)`; a model in a wrapper is to be compiled before
            it is wrapped.
        graph: capture the step in CUDA graphs; by default on GPUs, unless processes train together.

    Raises:
        ValueError: a setting out of range, or graphs asked for where there is no GPU.
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
        on_gpu = self.device.type == "cuda"
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {accumulation}")
        if not 0.0 <= grad_clip < float("inf"):
            raise ValueError(f"grad_clip must be at least 0 and finite, got {grad_clip}")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        if graph and not on_gpu:
            raise ValueError(f"graph=True needs a CUDA device, the model is on {self.device}")
        self.model = model
        self.optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self.accumulation, self.grad_clip, self.dtype = accumulation, grad_clip, dtype
        self._ranks = torch.distributed.get_world_size() if _is_shared(model) else 1
        if compiled and _is_shared(model):
            raise ValueError("compiled=True is for a model alone; compile the model, then wrap it")
        self.graph = on_gpu and not _is_shared(model) if graph is None else graph
        self._forward = torch.compile(model, fullgraph=True) if compiled else model
        scaled = dtype == torch.float16
        self._scale = torch.full((), _FIRST_SCALE if scaled else 1.0, device=self.device)
        self._grown = torch.zeros((), dtype=torch.int32, device=self.device) if scaled else None
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
        idx = idx.to(self.device, non_blocking=True).reshape(*parts, -1)  # [A, B / A, T]
        targets = targets.to(self.device, non_blocking=True).reshape(*parts, -1)  # [A, B / A, T]
        return StepResult(self._replay(idx, targets) if self.graph else self._run(idx, targets))

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state_dict(self) -> dict[str, Tensor]:
        """What a step carries on beside model and optimizers: the scale of float16's loss."""
        return {} if self._grown is None else {"scale": self._scale.clone(), "grown": self._grown.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from another's `state_dict`. One of another dtype has nothing to tell."""
        if self._grown is not None and state:
            self._scale.copy_(state["scale"])
            self._grown.copy_(state["grown"])

    def _capture_on(self, device: torch.device) -> None:
        self.graph, self._stream = True, cuda_graphs.capture_stream(device)
        # an optimizer that does not skip gradients itself has the host look at float16's, which no graph can
        waits = self._grown is not None and not all(map(supports_grad_scale, self.optimizers))
        self._captures_update = not waits and all("capturable" in group for group in self._groups)

    def _run(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Loss, norm and scale, [3], step by step."""
        self._zero_grad()
        weights = self._weights(targets)
        losses = []
        for number, part in enumerate(zip(idx, targets, weights, strict=True)):
            with _gradients_stay(self.model, number < self.accumulation - 1):
                losses.append(self._gradients(*part))
        loss = torch.stack(losses).sum()
        if self._ranks > 1:
            torch.distributed.all_reduce(loss)
        outcome = self._update(loss / self._ranks)
        self._zero_grad()
        return outcome

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _weights(self, targets: Tensor) -> Tensor:
        """The share of each part [A, B, T] in the targets that count, [A], of all processes.

        Times their number: they average their gradients.
        """
        counts = (targets >= 0).sum((1, 2))
        total = counts.sum()
        if self._ranks > 1:
            torch.distributed.all_reduce(total)
        return counts / total * self._ranks

    def _gradients(self, idx: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        """Add the gradients of a part of the batch; its share of the loss."""
        with devices.autocast(self.device, self.dtype):
            _, loss = self._forward(idx, targets)
        if self.accumulation * self._ranks > 1:  # where no target counts, the part's mean is not a number
            loss = torch.where(weight > 0.0, loss * weight, 0.0)
        (loss if self._grown is None else loss * self._scale).backward()
        return loss.detach().float()

    def _update(self, loss: Tensor) -> Tensor:
        """Clip, and step the optimizers; loss, norm and scale, [3]."""
        gradients = [p.grad for group in self._groups for p in group["params"] if p.grad is not None]
        scale = self._scale.clone()
        norm = full_tensor(get_total_norm(gradients)) / scale
        # `clip_grads_with_norm_`'s factor, as a divisor: the pass over the gradients that it would take is saved
        divisor = ((norm + 1e-6) / self.grad_clip).clamp(min=1.0) if self.grad_clip > 0.0 else torch.ones_like(norm)
        not_finite = (~norm.isfinite()).float()
        for optimizer in self.optimizers:
            self._step(optimizer, divisor * scale, not_finite)
        if self._grown is not None:
            update_grad_scale_(self._scale, self._grown, not_finite, 2.0, 0.5, _GROWTH_INTERVAL)
        return torch.stack([loss, norm, scale])

    def _step(self, optimizer: Any, divisor: Tensor, not_finite: Tensor) -> None:
        """Step with gradients that are divided first."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if supports_grad_scale(optimizer) and not any(map(is_dtensor, parameters)):
            optimizer.grad_scale, optimizer.found_inf = divisor, not_finite
            try:
                optimizer.step()
            finally:
                del optimizer.grad_scale, optimizer.found_inf
            return
        if self._grown is not None and bool(not_finite):
            return
        if self._grown is not None or self.grad_clip > 0.0:
            gradients = [to_local(p.grad) for p in parameters]
            foreach_div_(gradients, divisor)
        optimizer.step()

    def _replay(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Loss, norm and scale, [3], by graphs that are captured when this kind of step has been taken a few times."""
        self._set_rates()
        key = (idx.shape, self.model.training, *map(_settings, self._groups))
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
        groups = self._groups
        if not self._rates:
            self._rates = [torch.empty((), device=self.device) for _ in groups]
            for optimizer in self.optimizers:
                # a resumed optimizer may count its steps on the host
                for state in optimizer.state.values():
                    if isinstance(state.get("step"), Tensor):
                        state["step"] = state["step"].to(self.device)
                # what PyTorch would warn of is what the first steps are for
                silence_capturable_warning(optimizer)
        for group, rate in zip(groups, self._rates, strict=True):
            if group["lr"] is not rate:
                rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
                group["lr"] = rate
            group["capturable"] = True

    def _capture(self, idx: Tensor, targets: Tensor) -> _Captured:
        part, part_targets = idx[0].clone(), targets[0].clone()
        weight, total = self._weights(targets)[0].clone(), torch.zeros((), device=self.device)
        outcome = torch.zeros(3, device=self.device)

        def first() -> None:
            self._zero_grad()  # gradients are written, not added to zeros
            total.copy_(self._gradients(part, part_targets, weight))

        def more() -> None:
            total.add_(self._gradients(part, part_targets, weight))

        def update() -> None:
            outcome.copy_(self._update(total))

        pool = torch.cuda.graph_pool_handle()
        captured = _Captured(
            part, part_targets, weight, total, outcome, self._weights,
            first=cuda_graphs.capture(first, pool, self._stream),
            more=cuda_graphs.capture(more, pool, self._stream) if self.accumulation > 1 else None,
            update=cuda_graphs.capture(update, pool, self._stream) if self._captures_update else None,
            gradients={p: p.grad for group in self._groups for p in group["params"]},
        )  # fmt: skip
        if self._captures_update:  # nobody else is to add to what the graphs write
            self._zero_grad()
        return captured


@dataclass
class _Captured:
    """A step's graphs, and the tensors at whose addresses they read and write."""

    idx: Tensor  # [B / A, T]
    targets: Tensor  # [B / A, T]
    weight: Tensor
    total: Tensor  # the loss so far
    outcome: Tensor  # [3]
    weights: Callable[[Tensor], Tensor]
    first: Callable[[], None]
    more: Callable[[], None] | None
    update: Callable[[], None] | None
    gradients: dict[Tensor, Tensor | None]  # held, so that their memory stays the graphs'

    def replay(self, idx: Tensor, targets: Tensor, update: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Loss, norm and scale, [3]; `update` takes the place of the graph where the optimizer cannot be captured."""
        run = self.first
        for part in zip(idx, targets, self.weights(targets), strict=True):
            for static, given in zip((self.idx, self.targets, self.weight), part, strict=True):
                static.copy_(given)
            run()
            run = self.more or run
        if update is not None:
            for parameter, gradient in self.gradients.items():  # other graphs and steps have others
                parameter.grad = gradient
            return update(self.total)
        if self.update is not None:
            self.update()
        return self.outcome


def _is_shared(model: nn.Module) -> bool:
    """Whether processes train the model together."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, (nn.parallel.DistributedDataParallel, FSDPModule))


@contextlib.contextmanager
def _gradients_stay(model: Any, wait: bool) -> Iterator[None]:
    """Within it processes keep their gradients to themselves if they are to `wait` for a later part's."""
    if hasattr(model, "no_sync") and wait:
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not wait)
        yield
    else:
        yield


def _settings(group: dict) -> tuple:
    """What a graph takes for given of a group's settings: all but the learning rate."""
    changing = ("params", "lr", "initial_lr", "capturable")
    return tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in group.items() if n not in changing)
