"""Uninitialised memory holds NaN in every test of the kernels."""

import tempfile

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir

# hypothesis caches files there even without a database of examples
_HYPOTHESIS_HOME = tempfile.TemporaryDirectory()
set_hypothesis_home_dir(_HYPOTHESIS_HOME.name)


@pytest.fixture(autouse=True)
def poisoned_memory():
    # PyTorch then fills torch.empty and its relatives with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
