"""Chooses, before Triton is imported, whether kernels are compiled (a CUDA device is there) or interpreted."""

import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# the same examples on every run, however busy the machine is
settings.register_profile("suite", derandomize=True, deadline=None, database=None)
settings.load_profile("suite")

# tests that run in parallel start pytest themselves, which is to know nothing of that
os.environ.pop("PYTEST_XDIST_WORKER", None)

if torch.cuda.is_available():
    # with deterministic algorithms asked for, every product of cuBLAS warns unless this is set
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Skip modules that need the report's packages on a machine without them, which can still measure."""
    report = yield
    if report.failed and re.search(r"No module named '(pandas|jinja2|matplotlib|pydantic)'", str(report.longrepr)):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), None, "Skipped: needs the packages of pip install -e '.[bench]'")
    return report


@pytest.fixture
def nanogpt() -> Path:
    checkout = os.environ.get("NANOGPT")
    if not checkout:
        pytest.skip("needs a checkout of nanoGPT, whose folder is in the variable NANOGPT")
    return Path(checkout)
