"""Poison: memory that a kernel is given and does not write holds NaN, and shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    # with this on, PyTorch fills torch.empty and its relatives with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
