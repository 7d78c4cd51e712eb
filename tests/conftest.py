"""Chooses, before Triton is imported, whether kernels are compiled (a CUDA device is there) or interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
