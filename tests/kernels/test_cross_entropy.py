"""Memory, precision and edge cases of the cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference, tuning
from kernels.cross_entropy import chunk_rows
from tests.support.memory import peak_bytes
from tests.support.oracle import DEVICE


def problem(rows: int, width: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (width**-0.5 * torch.randn(classes, width, generator=generator)).to(DEVICE, dtype).requires_grad_()
    return x, weight, torch.randint(classes, (rows,), generator=generator).to(DEVICE)


def test_loss_and_gradients_take_an_eighth_of_the_references_memory():
    """Plain PyTorch holds the logits three times."""
    x, weight, targets = problem(256, 16, 2500)

    def peak(function, **options) -> int:
        return peak_bytes(lambda: torch.autograd.grad(function(x, weight, targets, **options), (x, weight)))

    eager, ours = peak(reference.linear_cross_entropy), peak(kernels.linear_cross_entropy, workspace_bytes=2**17)
    assert eager > 2.5 * 256 * 2500 * 4
    assert ours < eager / 8


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_without_gradients_takes_its_workspace_and_saves_no_logits(reduction: str):
    x, weight, targets = (t.detach() for t in problem(64, 4, 2048))
    options = {"reduction": reduction, "workspace_bytes": 2**16}
    peak = peak_bytes(lambda: kernels.linear_cross_entropy(x, weight, targets, **options))
    assert 2**16 <= peak < 2**16 + 64 * 4 * 8
    loss = kernels.linear_cross_entropy(x.requires_grad_(), weight, targets, reduction="none")
    assert sum(t.numel() for t in loss.grad_fn.saved_tensors if t.shape[-1:] == (2048,)) == 0


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=["x", "weight"])
def test_loss_computes_only_the_gradients_that_are_needed(needed: tuple[bool, bool]):
    """A frozen head takes no memory of its size."""
    x, weight, targets = problem(8, 8, 5000)
    x.requires_grad_(needed[0]), weight.requires_grad_(needed[1])
    peak = peak_bytes(lambda: kernels.linear_cross_entropy(x, weight, targets).backward())
    assert (peak > weight.nbytes + 8 * 5000 * 4) is needed[1]
    assert ((x.grad is None), (weight.grad is None)) == (not needed[0], not needed[1])


def test_chunks_have_one_size_that_fits_in_the_workspace():
    assert chunk_rows(32_768, 50_304 * 2, 2**29) == 4736  # seven chunks of whole tiles
    assert chunk_rows(100, 1000, 10**6) == 100
    assert chunk_rows(100, 1000, 30_000) == 25  # not 30, 30, 30 and 10
    assert chunk_rows(100, 1000, 1) == 1
    for n_rows in (1, 127, 128, 129, 1000, 4097):
        for fitting in (1, 100, 128, 200, 500):
            rows = chunk_rows(n_rows, 10, 10 * fitting)
            assert 1 <= rows <= max(fitting, 1)
            assert -(-n_rows // rows) == -(-n_rows // fitting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_loss_of_large_and_close_logits_is_exact(dtype: torch.dtype):
    """The maximum is subtracted before the multiplication by log2(e)."""
    x = torch.full((4, 1), 32.0, device=DEVICE, dtype=dtype)
    weight = torch.tensor([[30.0], [30.0625], [-30.0], [29.9375]], device=DEVICE, dtype=dtype)
    targets = torch.arange(4, device=DEVICE)
    loss = kernels.linear_cross_entropy(x, weight, targets, reduction="none")
    exact = reference.linear_cross_entropy(x.double(), weight.double(), targets, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)


def test_gradient_of_a_mean_does_not_underflow_in_half_precision():
    """Probabilities divided by the number of rows underflow in float16. Here the division follows the matmuls."""
    x, weight, targets = problem(256, 4, 40, torch.float16)
    exact_leaves = [t.detach().double().requires_grad_() for t in (x, weight)]

    def gradient(function, *leaves: Tensor) -> Tensor:
        return torch.autograd.grad(2e-4 * function(*leaves, targets), leaves[1])[0].double()

    exact = gradient(reference.linear_cross_entropy, *exact_leaves)
    ours, theirs = (gradient(f, x, weight) for f in (kernels.linear_cross_entropy, reference.linear_cross_entropy))
    assert (ours - exact).norm() < 0.03 * exact.norm()
    assert (theirs - exact).norm() > 0.1 * exact.norm()


def test_gradient_of_the_weight_under_autocast_is_float32_without_rounding():
    x, weight, targets = problem(40, 16, 50)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = kernels.linear_cross_entropy(x, weight, targets, workspace_bytes=64 * 2 * 7)  # seven rows at a time
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.fixture
def blocks_of_64():
    with tuning.forced({"cross_entropy": {"BLOCK": 64, "num_warps": 1}}):
        yield


@pytest.mark.usefixtures("blocks_of_64")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("classes", "padding"), [(63, 0), (64, 0), (128, 0), (128, 3), (129, 0), (130, 200)])
def test_loss_takes_targets_in_every_block(classes: int, padding: int, smoothing: float):
    """Full blocks and the last one, with padding in it, in further blocks, or nowhere."""
    targets = torch.tensor([t for t in (5, 0, 129, 64, 63, 62, 127, 128) if t < classes], device=DEVICE)
    x, weight, _ = problem(len(targets), 8, classes + padding)
    options = {"reduction": "none", "vocab_size": classes, "label_smoothing": smoothing}

    def results(function, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        loss = function(x, weight, targets, **options)
        return (loss, *torch.autograd.grad(loss.sum(), (x, weight)))

    exact = results(reference.linear_cross_entropy, *(t.detach().double().requires_grad_() for t in (x, weight)))
    for got, expected in zip(results(kernels.linear_cross_entropy, x, weight), exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("blocks_of_64")
@pytest.mark.parametrize("masked", [slice(0, 64), slice(64, 128), slice(128, 150), slice(1, 149)], ids=str)
def test_loss_takes_blocks_of_minus_infinity(masked: slice):
    """In such a block the running maximum is not finite yet."""
    weight = torch.linspace(-3, 3, 150, device=DEVICE)[:, None]
    weight[masked] = float("-inf")
    possible = weight[:, 0].isfinite().nonzero()[::20, 0]
    x = torch.ones(len(possible), 1, device=DEVICE)
    loss = kernels.linear_cross_entropy(x, weight.requires_grad_(), possible, reduction="none")
    exact = reference.linear_cross_entropy(x.double(), weight.double(), possible, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    expected, got = (torch.autograd.grad(total.sum(), weight)[0] for total in (exact, loss))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert not got[masked].any()


@pytest.mark.usefixtures("blocks_of_64")
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_ignores_nan_and_infinity_in_rows_that_do_not_count(value: float, reduction: str):
    x, weight, targets = problem(6, 8, 100)
    targets[2] = -100
    expected, x_bad = x.detach().clone().requires_grad_(), x.detach().clone()
    x_bad[2] = value
    upstream = torch.tensor([1.0, 2.0, value, 1.0, 3.0, 1.0], device=DEVICE) if reduction == "none" else None
    clean = None if upstream is None else upstream.nan_to_num(1.0, 1.0)
    loss = kernels.linear_cross_entropy(x_bad.requires_grad_(), weight, targets, reduction=reduction)
    same = kernels.linear_cross_entropy(expected, weight, targets, reduction=reduction)
    assert torch.equal(loss, same)
    assert torch.equal(torch.autograd.grad(loss, x_bad, upstream)[0], torch.autograd.grad(same, expected, clean)[0])


def test_mean_counts_rows_without_ignore_index():
    x, weight, targets = problem(6, 8, 10)
    nothing = torch.full_like(targets, -100)
    loss = kernels.linear_cross_entropy(x, weight, nothing)
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert not gradient.any()
    assert kernels.linear_cross_entropy(x, weight, nothing, reduction="sum") == 0.0
    some = targets.clone()
    some[2:4] = -100
    each = kernels.linear_cross_entropy(x, weight, some, reduction="none")
    assert not each[2:4].any()
    torch.testing.assert_close(kernels.linear_cross_entropy(x, weight, some), each.sum() / 4)


@pytest.mark.parametrize("target", [10, 2**40, -1])
def test_unchecked_target_out_of_range_gives_nan(target: int):
    """On a GPU targets are not checked, so this calls the operator without checks. Padding is out of range too."""
    x, weight, targets = problem(6, 8, 12)
    targets[3] = target
    arguments = (-100, "mean", 10, 0.0, 0.0, 2**20, [True, True])
    loss, dx, dweight, _ = torch.ops.gptfast.linear_cross_entropy(x.detach(), weight.detach(), targets % 10, *arguments)
    assert loss.isfinite()
    assert not dweight[10:].any()
    loss, dx, dweight, _ = torch.ops.gptfast.linear_cross_entropy(x.detach(), weight.detach(), targets, *arguments)
    assert loss.isnan()
    assert dx[3].isnan().all()
    assert dx[:3].isfinite().all()
    assert dweight[:10].isnan().all()


def test_backward_runs_twice_with_the_same_bits():
    """The saved gradients are not scaled in place."""
    x, weight, targets = problem(6, 8, 10)
    loss, three = kernels.linear_cross_entropy(x, weight, targets), torch.tensor(3.0, device=DEVICE)
    first, second = (torch.autograd.grad(loss, (x, weight), three, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
