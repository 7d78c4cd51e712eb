"""What the kernels and the model are worth, measured. Run by `pytest benchmarks --benchmark-only`."""
