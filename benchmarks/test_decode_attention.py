"""`decode_attention` against eager PyTorch and the peers, forward."""

import pytest

from benchmarks.measuring import peers, shapes
from benchmarks.measuring.comparison import MODES
from benchmarks.measuring.harness import CLOCK, case_id, report


@pytest.fixture(scope="module", params=shapes.DECODE, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", peers.PROVIDERS["decode_attention"])
@pytest.mark.parametrize("mode", MODES)
def test_decode_attention(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
