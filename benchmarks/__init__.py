"""Benchmarks of the Triton kernels and of whole models, against eager PyTorch and other implementations."""

RESULTS_FORMAT = 1  # "gptfast_results" in results files
