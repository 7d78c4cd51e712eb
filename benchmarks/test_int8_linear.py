"""`int8_linear` against eager PyTorch and the peers, forward."""

import pytest

from benchmarks.measuring import operator_cases, operator_providers
from benchmarks.measuring.operator_bench import MODES
from benchmarks.measuring.pytest_bridge import CLOCK, case_id, report


@pytest.fixture(scope="module", params=operator_cases.INT8, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", operator_providers.PROVIDERS["int8_linear"])
@pytest.mark.parametrize("mode", MODES)
def test_int8_linear(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
