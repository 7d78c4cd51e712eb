"""Every operator against eager PyTorch and its peers; `-k "layer_norm and backward"` selects."""

import pytest
import torch

from benchmarks.operators import OPERATORS

CASES = [case for operator in OPERATORS.values() for case in operator.cases]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="operators are measured on a CUDA GPU, and none was found")
def test_operator(record):
    record()
