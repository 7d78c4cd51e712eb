"""`int8_linear` against eager PyTorch and the peers, forward."""

import pytest

from benchmarks.measuring import peers, shapes
from benchmarks.measuring.comparison import MODES
from benchmarks.measuring.harness import CLOCK, case_id, report


@pytest.fixture(scope="module", params=shapes.INT8, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", peers.PROVIDERS["int8_linear"])
@pytest.mark.parametrize("mode", MODES)
def test_int8_linear(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
