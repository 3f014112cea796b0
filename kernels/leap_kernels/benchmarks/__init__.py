"""Benchmarks of the kernels, one module per op: ``python -m leap_kernels.benchmarks.<op>``."""
