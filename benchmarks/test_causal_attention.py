"""`causal_attention` against eager PyTorch and the peers, forward, backward and both."""

import pytest

from benchmarks.measuring import operator_cases, operator_providers
from benchmarks.measuring.operator_bench import MODES
from benchmarks.measuring.pytest_bridge import CLOCK, case_id, report


@pytest.fixture(scope="module", params=operator_cases.ATTENTION, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", operator_providers.PROVIDERS["causal_attention"])
@pytest.mark.parametrize("mode", MODES)
def test_causal_attention(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
