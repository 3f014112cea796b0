"""Kernels and formats for masked and sparse linear layers."""

from leap_kernels.bmp128 import BMP128, pack
from leap_kernels.mask_ops import mask_backward, mask_forward
from leap_kernels.philox import logistic_noise
from leap_kernels.sparse_linear import SparseLinear, sparse_linear

__all__ = ["BMP128", "SparseLinear", "logistic_noise", "mask_backward", "mask_forward", "pack", "sparse_linear"]
