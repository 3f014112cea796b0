"""Pieces shared by the Triton kernels of learning: counter-based randomness and the sigmoid, as in native code."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice


def has_fast_math(tensor: Tensor) -> bool:
    """Whether FAST_MATH may be set: NVIDIA's libdevice has these functions, AMD's and the interpreter do not."""
    return tensor.is_cuda and torch.version.hip is None


@triton.jit
def random_words(block, seed, layer, step):
    """Words of the weights 4 * block .. 4 * block + 4, interleaved: uint32 [4 * len(block)]. block: int64.

    The counter layout stands in :mod:`leap_kernels.philox`.
    """
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, high, zero + step.to(tl.uint32), zero + layer.to(tl.uint32))
    return tl.interleave(tl.interleave(r0, r2), tl.interleave(r1, r3))


@triton.jit
def divide(a, b, FAST_MATH: tl.constexpr):
    """a / b; FAST_MATH takes the hardware's approximation (relative error 2**-22, and 0 for b above 2**126)."""
    return libdevice.fast_dividef(a, b) if FAST_MATH else a / b


@triton.jit
def round_to_bf16(x, words):
    """Finite fp32 to a bfloat16 beside it, by the lower 16 bits of uint32 words, as in :mod:`leap_kernels.adam8bit`."""
    bits = x.to(tl.int32, bitcast=True) + (words & 0xFFFF).to(tl.int32)
    return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def logistic_noise(block, seed, layer, step, FAST_MATH: tl.constexpr):
    """Noise of the weights 4 * block .. 4 * block + 4, interleaved: float32 [4 * len(block)]. block: int64.

    The way from words to noise stands in :mod:`leap_kernels.philox`. FAST_MATH takes the hardware's approximate
    division and logarithm (absolute error about 3e-7).
    """
    words = random_words(block, seed, layer, step)
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
