"""Distributed training: the process group that torchrun starts, wrapping by DDP or FSDP2, and DTensors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes of a run. Use it as a context manager around training.

    Args:
        rank: of this process.
        size: number of processes.
        local_rank: rank on this machine, which is the index of the process's GPU.
        local_size: number of processes on this machine.
        restarts: how often torchrun has restarted the processes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """Read torchrun's environment variables. Without them the run is a single process.

        Raises:
            ValueError: only some of the variables are set.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, size, local_rank, local_size = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"WORLD_SIZE is set without torchrun's other variables ({error}); start with torchrun, or unset it"
            ) from error
        return cls(rank, size, local_rank, local_size, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    @property
    def is_main(self) -> bool:
        """True for the process that prints and writes files."""
        return self.rank == 0

    @property
    def is_single(self) -> bool:
        """True if there are no other processes."""
        return self.size == 1

    def device(self, device: torch.device) -> torch.device:
        """Return this process's device.

        Raises:
            ValueError: fewer GPUs than processes, or a GPU index given for several processes.
        """
        if self.is_single or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(f"device must be cuda, as each process takes the GPU of its rank, got {device}")
        if self.local_size > torch.cuda.device_count():
            raise ValueError(f"{self.local_size} processes need as many GPUs, found {torch.cuda.device_count()}")
        return torch.device("cuda", self.local_rank)

    def connect(self, device: torch.device) -> None:
        """Initialise the process group: Gloo for tensors on the host, NCCL for those on GPUs."""
        if self.is_single:
            return
        if self.local_size == self.size and sys.platform == "linux":
            # on a single machine the host name may not resolve
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun's store survives a restart, and with it the addresses of the processes that were replaced
        store = dist.PrefixStore(f"restart-{self.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)

    def __enter__(self) -> World:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # after an error other processes may wait in a collective, until this process ends
        if not self.is_single and dist.is_initialized() and error is None:
            dist.destroy_process_group()

    def run_on_main(self, function: Callable[[], Any]) -> Any:
        """Call `function` on the main process and broadcast its result, which JSON can hold, or its ValueError."""
        if self.is_single:
            return function()
        outcome: dict[str, Any] = {}
        if self.is_main:
            try:
                outcome["result"] = function()
            except ValueError as error:
                outcome["error"] = str(error)
        # as JSON: `broadcast_object_list` would pickle it
        text = torch.tensor(list(json.dumps(outcome).encode()), dtype=torch.uint8)
        length = torch.tensor(len(text))
        with self.collective_errors():
            dist.broadcast(length, 0)
            text = text if self.is_main else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0)
        outcome = json.loads(bytes(text.tolist()))
        if "error" in outcome:
            raise ValueError(outcome["error"])
        return outcome["result"]

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any rank. Collective: every rank must call it."""
        return flag if self.is_single else bool(self.sum(torch.tensor(int(flag))))

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce a tensor on the host, in place. Collective: every rank must call it."""
        if not self.is_single:
            with self.collective_errors():
                dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def collective_errors(self) -> Iterator[None]:
        """Replace a communication error by a RuntimeError of one line: another process has ended."""
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            # a backward runs collectives, but may also fail for other reasons
            if self.is_single or not any(name in text.lower() for name in ("gloo", "nccl")):
                raise
            raise RuntimeError(
                f"another process of this run has ended ({text[:200]}); continue from the last checkpoint with --resume"
            ) from error

    def wrap(self, model: nn.Module, blocks: Iterable[nn.Module], parallel: str, compiled: bool) -> nn.Module:
        """Wrap a model for training by several processes.

        Args:
            model: returned unchanged in a single process.
            blocks: the model's transformer blocks, which FSDP shards and compiles one by one.
            parallel: "ddp" replicates the model; "fsdp" shards it in place, and its parameters become `DTensor`s.
            compiled: compile the whole model ("ddp") or each block ("fsdp", which gathers parameters between blocks).
        """
        if self.is_single:
            return model
        if parallel == "ddp":
            module: Any = torch.compile(model, fullgraph=True) if compiled else model
            device_ids = [self.local_rank] if next(model.parameters()).is_cuda else None
            return nn.parallel.DistributedDataParallel(module, device_ids=device_ids, gradient_as_bucket_view=True)
        from torch.distributed.fsdp import fully_shard  # slow to import

        for block in blocks:
            if compiled:
                _compile_training(block)
            fully_shard(block)
        fully_shard(model)
        return model


def _compile_training(block: nn.Module) -> None:
    """Compile a block's forward without its hooks. Evaluation stays eager: its sequences have many lengths."""
    eager = block.forward
    compiled = torch.compile(eager, fullgraph=True)

    def forward(*arguments: Any) -> Any:
        return (compiled if block.training else eager)(*arguments)

    block.forward = forward


def exit_process(status: int | str | None) -> NoReturn:
    """End this process as `sys.exit` does, but without interpreter shutdown under torchrun.

    A Gloo thread may hold the last reference to a tensor, and freeing it during shutdown aborts the process
    (https://github.com/pytorch/pytorch/issues/190489). FSDP's caches keep those threads alive.
    """
    if "WORLD_SIZE" not in os.environ or isinstance(status, str):
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def is_dtensor(tensor: Any) -> bool:
    """Return True for a DTensor, without importing `torch.distributed.tensor`, which is slow."""
    return hasattr(tensor, "full_tensor")


def to_local(tensor: Any) -> Tensor:
    """Return this rank's shard of a DTensor, and any other tensor unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_tensor(tensor: Any) -> Tensor:
    """Gather a DTensor, and return any other tensor unchanged. Collective: every rank must call it."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def distribute_like(tensor: Tensor, parameter: Any) -> Tensor:
    """Shard a full tensor as `parameter` is sharded, if that is a DTensor of the same shape."""
    if not is_dtensor(parameter) or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor  # slow to import

    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
