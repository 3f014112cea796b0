"""Kernels and formats for masked and sparse linear layers."""
