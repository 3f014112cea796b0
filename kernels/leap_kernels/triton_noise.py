"""Pieces shared by the Triton mask kernels: counter-based logistic noise and the sigmoid, as in native/mask_ops.cpp."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


def has_fast_math(tensor: Tensor) -> bool:
    """Whether FAST_MATH may be set: NVIDIA's libdevice has these functions, AMD's and the interpreter do not."""
    return tensor.is_cuda and torch.version.hip is None


@triton.jit
def logistic_noise(block, seed, layer, step, FAST_MATH: tl.constexpr):
    """Noise of the weights 4 * block .. 4 * block + 4, interleaved: float32 [4 * len(block)]. block: int64.

    The counter layout and the way from words to noise stand in :mod:`leap_kernels.philox`. FAST_MATH takes the
    hardware's approximate division and logarithm (absolute error about 3e-7).
    """
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + layer.to(tl.uint32))
    words = tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))
    a = (words >> 9).to(tl.int32).to(tl.float32) + 0.5
    b = 8388608.0 - a
    return libdevice.fast_logf(libdevice.fast_dividef(a, b)) if FAST_MATH else tl.log(a / b)


@triton.jit
def sigmoid_and_slope(z, FAST_MATH: tl.constexpr):
    """(sigmoid(z), sigmoid(z) * (1 - sigmoid(z))), the second without cancellation.

    FAST_MATH takes the hardware's approximate exponential and division (relative error about 1e-6; the denominator lies
    in [1, 2]), which saves 11 instructions per weight in the forward kernel compiled for sm_90.
    """
    if FAST_MATH:
        e = libdevice.fast_expf(-tl.abs(z))
        s = libdevice.fast_dividef(1.0, 1.0 + e)
    else:
        e = tl.exp(-tl.abs(z))
        s = 1.0 / (1.0 + e)
    small = e * s
    return tl.where(z < 0, small, s), small * s
