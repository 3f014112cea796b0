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
    c0, c1, c2, c3 = low, high, zero + step.to(tl.uint32), zero + layer.to(tl.uint32)
    seed = seed.to(tl.uint64)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One product of 64 bits is one instruction; its halves apart, as in tl.philox, are two.
        product0, product1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


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
    if FAST_MATH:
        # The upper 23 bits become the mantissa of a number in [1, 2): u and 1 - u come out exact, so their ratio is
        # that of the other branch, bit for bit, without a conversion.
        bits = tl.inline_asm_elementwise(
            "shf.r.clamp.b32 $0, $1, 127, 9;", "=r,r", [words], tl.uint32, is_pure=True, pack=1
        )
        u = bits.to(tl.float32, bitcast=True) - 0.999999940395355224609375
        return libdevice.fast_logf(libdevice.fast_dividef(u, 1.0 - u))
    a = (words >> 9).to(tl.int32).to(tl.float32) + 0.5
    return tl.log(a / (8388608.0 - a))


@triton.jit
def sigmoid(z, factor, FAST_MATH: tl.constexpr):
    """sigmoid(z * factor), as accurate for large negative numbers as for positive; 0 below -88. factor: a scalar."""
    return reciprocal(1.0 + tl.exp2(z * (factor * -1.4426950408889634)), FAST_MATH)


@triton.jit
def reciprocal(x, FAST_MATH: tl.constexpr):
    """1 / x for x of at least 1; FAST_MATH takes the hardware's approximation (relative error 2**-22)."""
    if FAST_MATH:
        # What a division makes of it has an addition of 0 besides.
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return 1.0 / x


@triton.jit
def sigmoid_and_slope(z, FAST_MATH: tl.constexpr):
    """(sigmoid(z), sigmoid(z) * (1 - sigmoid(z))), the second without cancellation."""
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    s = reciprocal(1.0 + e, FAST_MATH)
    small = e * s
    return tl.where(z < 0, small, s), small * s


@triton.jit
def slope_of_sigmoid(z, FAST_MATH: tl.constexpr):
    """sigmoid(z) * (1 - sigmoid(z)) without cancellation."""
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    s = reciprocal(1.0 + e, FAST_MATH)
    return e * s * s
