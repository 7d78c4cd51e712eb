"""Poison: memory that a kernel is given and does not write holds NaN, and shows."""

import pytest
import torch
from hypothesis.configuration import set_hypothesis_home_dir


@pytest.fixture(autouse=True, scope="session")
def nothing_is_written_to_the_working_tree(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))  # it caches there even without a database


@pytest.fixture(autouse=True)
def poisoned_memory():
    # with this on, PyTorch fills torch.empty and its relatives with NaN
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
