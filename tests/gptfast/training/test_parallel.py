"""Two processes on halves of a batch equal one on the whole batch, also with unequal numbers of targets that count."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gptfast import GPT, GPTConfig, TrainStep
from gptfast.distributed import full_tensor

ROOT = Path(__file__).parents[3]
PROCESSES, BATCH_SIZE = 2, 4


def build(backend: str) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=31, n_layer=2, n_head=2, n_embd=16, pad_vocab_size_to=16)
    return GPT(config, backend)


def train(model: nn.Module, rows: slice, accumulation: int = 1) -> Tensor:
    """Take three steps on some rows of batches, whose later rows have fewer targets; return losses and norms."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, eps=1e-3, fused=True)
    step = TrainStep(model, optimizer, accumulation, grad_clip=0.3)
    generator = torch.Generator().manual_seed(1)
    outcome = []
    for _ in range(3):
        tokens = torch.randint(31, (BATCH_SIZE, 9), generator=generator)
        targets = tokens[:, 1:].clone()
        for row in range(BATCH_SIZE):
            targets[row, : 2 * row] = -1
        result = step(tokens[rows, :-1], targets[rows])
        outcome.append((result.loss, result.grad_norm))
    return torch.tensor(outcome)


def trained(backend: str, rows: slice) -> dict[str, Tensor]:
    model = build(backend)
    outcome = train(model, rows)
    return {"outcome": outcome, **{name: parameter.detach() for name, parameter in model.named_parameters()}}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other)
    return max((one[name] - tensor).abs().max().item() for name, tensor in other.items())


def replicated(model: GPT) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: GPT) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    return model


WRAPPERS = {"DDP": replicated, "FSDP": sharded}


def run_process(wrapper: str, rank: int, folder: Path) -> None:
    """Train on the rows of a rank, and write the full parameters that this rank sees."""
    store = torch.distributed.FileStore(str(folder / "store"), PROCESSES)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    model = build("triton")
    share = BATCH_SIZE // PROCESSES
    outcome = train(WRAPPERS[wrapper](model), slice(rank * share, (rank + 1) * share), accumulation=2)
    parameters = {name: full_tensor(parameter).detach() for name, parameter in model.named_parameters()}
    torch.save({"outcome": outcome, **parameters}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_train_step_of_two_ranks_equals_one_process(wrapper: str, tmp_path: Path):
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",  # the host name may not resolve
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
    }
    commands = [[sys.executable, __file__, wrapper, str(rank), str(tmp_path)] for rank in range(PROCESSES)]
    processes = [
        subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for c in commands
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * PROCESSES, "\n".join(outputs)
    whole, first_half = trained("eager", slice(None)), trained("eager", slice(BATCH_SIZE // 2))
    assert largest_difference(first_half, whole) > 1e-3
    for rank in range(PROCESSES):
        assert largest_difference(torch.load(tmp_path / f"{rank}.pt"), whole) < 1e-5


if __name__ == "__main__":
    run_process(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
