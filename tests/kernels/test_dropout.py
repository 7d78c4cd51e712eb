"""Dropout masks of every operator with dropout.

`test_operators.py` compares results and gradients with the reference under the same mask.
"""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from tests.support.cases import Case
from tests.support.operators import DROPOUT, OPERATORS
from tests.support.oracle import DEVICE
from tests.support.running import assert_equal_to_reference, assert_same_bits, call, run

FLOAT32 = torch.float32
# enough elements for statistics, and several blocks in each dimension
WIDE = [case.with_batch(16) for case in DROPOUT]


def kept(case: Case, **options) -> torch.Tensor:
    case = case.with_options(**options)
    return case.row.dropout.mask(case)


def test_every_operator_with_dropout_has_a_case():
    assert {case.operator for case in DROPOUT} == {o.name for o in OPERATORS.values() if o.dropout is not None}


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_dropout_keeps_the_right_share(case: Case, p: float):
    candidates = case.row.dropout.candidates(case)
    mask = kept(case, dropout_p=p, seed=3)
    share = mask[candidates].float().mean().item()
    # four standard deviations of a binomial share
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / int(candidates.sum())) ** 0.5
    assert not mask[~candidates].any()


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_dropout_is_independent_of_neighbours(case: Case):
    """Half of all neighbours agree, in every dimension: no row, head or block repeats another's mask."""
    candidates, mask = case.row.dropout.candidates(case), kept(case, dropout_p=0.5, seed=3)
    for dim in range(mask.dim()):
        if mask.shape[dim] == 1:
            continue
        both = candidates.narrow(dim, 1, mask.shape[dim] - 1) & candidates.narrow(dim, 0, mask.shape[dim] - 1)
        agree = (mask.diff(dim=dim) == 0)[both].float()
        assert abs(agree.mean().item() - 0.5) < 4 * (0.25 / agree.numel()) ** 0.5, f"dimension {dim}"


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_mask_is_a_function_of_the_seed(case: Case):
    first = kept(case, seed=3)
    assert torch.equal(kept(case, seed=3), first)
    assert torch.equal(kept(case, seed=torch.tensor([3], device=DEVICE)), first)
    assert torch.equal(kept(case, seed=torch.tensor(3, device=DEVICE)), first)
    for other in (4, 3 + 2**32, -3, 2**63 - 1):
        assert not torch.equal(kept(case, seed=other), first), other


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_without_a_seed_uses_the_global_generator(case: Case):
    case = case.with_options(seed=None, dropout_p=0.5)
    torch.manual_seed(0)
    first, second = (call(case.kernel, case, case.inputs(FLOAT32))[case.row.results[-1]] for _ in range(2))
    torch.manual_seed(0)
    again = call(case.kernel, case, case.inputs(FLOAT32))[case.row.results[-1]]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_no_dropout_ignores_the_seed_and_the_generator(case: Case):
    inputs, upstream = case.inputs(FLOAT32), case.upstream(FLOAT32)
    state = torch.cuda.get_rng_state if DEVICE.type == "cuda" else torch.get_rng_state
    before = state()
    outcomes = [
        run(case.kernel, case.with_options(dropout_p=0.0, seed=seed), inputs, upstream)
        for seed in (None, 5, torch.tensor([6], device=DEVICE))
    ]
    assert torch.equal(state(), before)
    assert_equal_to_reference(case.with_options(dropout_p=0.0), inputs, upstream, outcomes[0])
    for outcome in outcomes[1:]:
        assert_same_bits(outcome, outcomes[0])


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_reference_dropout_is_a_function_of_the_seed(case: Case):
    function, name = getattr(reference, case.operator), case.row.results[-1]
    first, second, other = (call(function, case.with_options(seed=s), case.inputs(FLOAT32))[name] for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
