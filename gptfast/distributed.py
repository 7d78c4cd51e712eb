"""Processes that train together, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptfast.model import GPT


def leave(status: int | str | None) -> NoReturn:
    """End this process as `sys.exit` does, but at once where torchrun has started it.

    A thread of Gloo may still hold the last reference to a tensor. Letting go of it while the interpreter shuts down
    aborts the process (https://github.com/pytorch/pytorch/issues/190489), and FSDP's caches keep those threads alive
    whatever is destroyed.
    """
    if "WORLD_SIZE" not in os.environ or isinstance(status, str):
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


@dataclass(frozen=True)
class World:
    """The processes of a run. As a context manager it connects them; alone, it has nothing to do.

    Args:
        rank: of this process.
        size: how many there are.
        local_rank: of this process among those of its machine: the number of its GPU.
        local_size: how many of them there are.
        restarts: how often torchrun has begun anew.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0

    @classmethod
    def of_environment(cls) -> World:
        """What torchrun's variables tell; without them this process is alone.

        Raises:
            ValueError: some are there and others are not.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        try:
            rank, size, local_rank, local_size = (
                int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"WORLD_SIZE is set, but not all that torchrun sets with it ({error}); start with torchrun, or unset it"
            ) from error
        return cls(rank, size, local_rank, local_size, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))

    @property
    def first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def device(self, device: torch.device) -> torch.device:
        """This process's own of a machine's devices.

        Raises:
            ValueError: there are fewer GPUs than processes, or one is asked for by number.
        """
        if self.alone or device.type != "cuda":
            return device
        if device.index is not None:
            raise ValueError(f"each process has a GPU of its own: give --device cuda, got {device}")
        if self.local_size > torch.cuda.device_count():
            raise ValueError(f"{self.local_size} processes need as many GPUs, found {torch.cuda.device_count()}")
        return torch.device("cuda", self.local_rank)

    def connect(self, device: torch.device) -> None:
        """Meet the other processes. Tensors on the host travel by Gloo, those on GPUs by NCCL."""
        if self.alone:
            return
        if self.local_size == self.size and sys.platform == "linux":
            # all on this machine, whose name need not have an address
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun's store outlives its processes: in it are the addresses of those that a restart has replaced
        store = dist.PrefixStore(f"restart-{self.restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)

    def __enter__(self) -> World:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        # after an error the others may be waiting for this process: they learn of it by its end
        if not self.alone and dist.is_initialized() and error is None:
            dist.destroy_process_group()

    def share(self, function: Callable[[], Any]) -> Any:
        """What `function` returns in the first process, as JSON has it, in all of them; its ValueError likewise."""
        if self.alone:
            return function()
        content: dict[str, Any] = {}
        if self.first:
            try:
                content["result"] = function()
            except ValueError as error:
                content["error"] = str(error)
        text = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
        length = torch.tensor(len(text))
        with self.meeting():
            dist.broadcast(length, 0)
            text = text if self.first else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0)
        content = json.loads(bytes(text.tolist()))
        if "error" in content:
            raise ValueError(content["error"])
        return content["result"]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in at least one process. All have to ask."""
        return flag if self.alone else bool(self.sum(torch.tensor(float(flag))) > 0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor on the host."""
        if not self.alone:
            with self.meeting():
                dist.all_reduce(values)
        return values

    @contextlib.contextmanager
    def meeting(self) -> Iterator[None]:
        """Where other processes are waited for: within it, the end of one is an error that says so.

        Raises:
            RuntimeError: another process has ended.
        """
        try:
            yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            # gradients travel within the backward, whose errors may be of any kind
            if self.alone or not any(name in text.lower() for name in ("gloo", "nccl")):
                raise
            raise RuntimeError(
                f"another process of this run has ended ({text[:200]}); the run can go on from its last checkpoint, "
                "with --resume"
            ) from error

    def wrap(self, model: GPT, parallel: str, compiled: bool) -> nn.Module:
        """The model for training together: "ddp" gives each process all of it, "fsdp" a part of every parameter.

        With "fsdp" the model itself is changed, and its parameters are `DTensor`s. Compiled are then its blocks, one by
        one: between them parameters are gathered.
        """
        if self.alone:
            return model
        if parallel == "ddp":
            whole: Any = torch.compile(model, fullgraph=True) if compiled else model
            ids = [self.local_rank] if model.lm_head.weight.is_cuda else None
            return nn.parallel.DistributedDataParallel(whole, device_ids=ids, gradient_as_bucket_view=True)
        from torch.distributed.fsdp import fully_shard

        for block in model.transformer.h:
            if compiled:
                _compile(block)
            fully_shard(block)
        fully_shard(model)
        return model


def _compile(block: nn.Module) -> None:
    """Compile a block's training, without the hooks around it; evaluation, whose lengths vary, stays as it is."""
    plain = block.forward
    compiled = torch.compile(plain, fullgraph=True)

    def forward(*arguments: Any) -> Any:
        return (compiled if block.training else plain)(*arguments)

    block.forward = forward
