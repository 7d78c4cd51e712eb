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

from gptfast import GPT, GPTConfig, TrainStep
from gptfast.distributed import World, full_tensor, is_dtensor

BATCH_SIZE = 4


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


def run_process(parallel: str, folder: Path) -> None:
    """Train on the rows of this rank, and write the full parameters that it sees."""
    torch.distributed.init_process_group("gloo")
    world, model = World.from_environment(), build("triton")
    wrapped = world.wrap(model, model.transformer.h, parallel, compiled=False)
    assert all(is_dtensor(p) and p.to_local().numel() < p.numel() for p in model.parameters()) is (parallel == "fsdp")
    share = BATCH_SIZE // world.size
    outcome = train(wrapped, slice(world.rank * share, (world.rank + 1) * share), accumulation=2)
    parameters = {name: full_tensor(parameter).detach() for name, parameter in model.named_parameters()}
    torch.save({"outcome": outcome, **parameters}, folder / f"{world.rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_train_step_of_two_ranks_equals_one_process(parallel: str, tmp_path: Path):
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",  # the host name may not resolve
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "TRITON_INTERPRET": "1",
    }
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *torchrun, __file__, parallel, str(tmp_path)],
        env=os.environ | environment, timeout=120, check=True,
    )  # fmt: skip
    whole, first_half = trained("eager", slice(None)), trained("eager", slice(BATCH_SIZE // 2))
    assert largest_difference(first_half, whole) > 1e-3
    for rank in range(2):
        assert largest_difference(torch.load(tmp_path / f"{rank}.pt"), whole) < 1e-5


if __name__ == "__main__":
    run_process(sys.argv[1], Path(sys.argv[2]))
