"""`linear_cross_entropy` against eager PyTorch and the peers, without gradients and with both."""

import pytest

from benchmarks.measuring import peers, shapes
from benchmarks.measuring.comparison import MODES
from benchmarks.measuring.harness import CLOCK, case_id, report


@pytest.fixture(scope="module", params=shapes.LOSS, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", peers.PROVIDERS["linear_cross_entropy"])
@pytest.mark.parametrize("mode", MODES)
def test_linear_cross_entropy(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
