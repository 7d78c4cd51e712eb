"""`linear_cross_entropy` against eager PyTorch and the peers, without gradients and with both."""

import pytest

from benchmarks.measuring import operator_cases, operator_providers
from benchmarks.measuring.operator_bench import MODES
from benchmarks.measuring.pytest_bridge import CLOCK, case_id, report


@pytest.fixture(scope="module", params=operator_cases.LOSS, ids=case_id)
def case(request):
    return request.param


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", operator_providers.PROVIDERS["linear_cross_entropy"])
@pytest.mark.parametrize("mode", MODES)
def test_linear_cross_entropy(benchmark, comparison, mode, provider):
    report(benchmark, comparison, provider, mode)
