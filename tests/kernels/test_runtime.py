import pytest
import torch

from kernels import runtime


@pytest.fixture
def restored_precision():
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("restored_precision")
def test_float32_products_follow_both_settings_of_pytorch():
    assert runtime.dot_precision(torch.float32) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert runtime.dot_precision(torch.float32) == "tf32"
    torch.set_float32_matmul_precision("highest")
    assert runtime.dot_precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert runtime.dot_precision(torch.float32) == "tf32"
