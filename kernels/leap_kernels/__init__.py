"""Kernels and formats for masked and sparse linear layers."""

from leap_kernels.mask_ops import mask_backward, mask_forward
from leap_kernels.philox import logistic_noise

__all__ = ["logistic_noise", "mask_backward", "mask_forward"]
