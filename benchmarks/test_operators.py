"""Every operator against eager PyTorch and its peers; `-k "layer_norm and backward"` selects."""

import pytest
import torch

from benchmarks.measuring.pytest_bridge import measure_each, record
from benchmarks.operators import OPERATORS


@pytest.mark.skipif(not torch.cuda.is_available(), reason="operators are measured on a CUDA GPU, and none was found")
@measure_each(case for operator in OPERATORS.values() for case in operator.cases)
def test_operator(benchmark, bench, mode, provider):
    record(benchmark, bench, mode, provider)
