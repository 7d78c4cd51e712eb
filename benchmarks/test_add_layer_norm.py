"""`add_layer_norm` against eager PyTorch and the peers, forward, backward and both."""

import pytest

from benchmarks.measuring import peers, shapes
from benchmarks.measuring.comparison import MODES
from benchmarks.measuring.harness import CLOCK, case_id, report


@pytest.fixture(scope="module", params=shapes.ADD_LAYER_NORM, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", peers.PROVIDERS["add_layer_norm"])
@pytest.mark.parametrize("mode", MODES)
def test_add_layer_norm(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
