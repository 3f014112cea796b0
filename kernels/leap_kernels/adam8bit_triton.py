"""The step of packed Adam on a GPU, in one pass over memory; see :mod:`leap_kernels.adam8bit` for the contract."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from leap_kernels.triton_launch import Launcher
from leap_kernels.triton_noise import divide, has_fast_math, random_words, round_to_bf16

if TYPE_CHECKING:
    from leap_kernels.adam8bit import AdamStep

# Elements per program: two Philox blocks for each of 128 threads.
_BLOCK = 1024


@triton.jit
def grid_value(code):
    """v by code 0 .. 1023, fp32: 2**((code - 1) / 12 - 68), and 0 for code 0.

    The whole octaves are added to the exponent: in the sum, fp32 would lose five bits of what is left over.
    """
    octave = (code * 43691 + (11 * 43691 - (69 << 19))) >> 19  # (code - 1) // 12 - 68
    power = tl.exp2((code - 817 - 12 * octave).to(tl.float32) * 0.08333333333333333)
    bits = power.to(tl.int32, bitcast=True) + (octave << 23)
    return tl.where(code > 0, bits.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def middle(words):
    """Middles of 256 equal parts of (0, 1), by the lowest byte, which becomes the mantissa of a number in [1, 2)."""
    return (((words & 0xFF) << 15) | 0x3F800000).to(tl.float32, bitcast=True) - 0.998046875


@triton.jit
def pack_moments(m, v, unit, words, FAST_MATH: tl.constexpr):
    """int16 from fp32 m and v, as :func:`leap_kernels.adam8bit.pack_moments` does it.

    The number of the greatest grid value below v comes from a logarithm that is off by less than a thousandth of the
    gap between two grid values. So at a grid value the number may be one too large or too small. Neither changes what
    is stored: rounding draws a middle of 256 parts, and a v so close to a grid value is on its side of every middle.
    """
    log2 = libdevice.fast_log2f(v) if FAST_MATH else tl.log2(v)
    place = (log2 + 68.0) * 12.0 + 1.0
    code = tl.minimum(tl.maximum(place, 0.0), 1023.0).to(tl.int32)
    low = grid_value(code)
    high = tl.where(code > 0, low * 1.0594630943592953, 3.3881317890172014e-21)  # 2**(1 / 12) times low; 2**-68
    up = (v - low > (high - low) * middle(words)) & (code < 1023)
    root = tl.sqrt(tl.where(up, high, low))
    code += up.to(tl.int32)
    # Above 0, where the conversion to integers rounds down.
    multiple = divide(m, root * unit, FAST_MATH) + (middle(words >> 8) + 32.0)
    multiple = tl.minimum(tl.maximum(multiple, 1.0), 63.5).to(tl.int32)
    multiple = tl.where(code > 0, multiple, 32)  # m is given up where v rounds to 0
    return (code * 64 + multiple - 32768).to(tl.int16)


_NUMBERS = ["first_block", "seed", "layer", "step", "unit", "beta1", "beta2", "rate", "root_scale", "shift"]


@triton.jit(do_not_specialize=["shift_ptr", *_NUMBERS])
def adam8bit_kernel(
    logits_ptr,
    grad_ptr,
    moments_ptr,
    shift_ptr,  # [1]; read only if SHIFT_IN_MEMORY, else shift is what it would point to
    count,
    skip,  # elements of first_block that belong to the weights before this slice
    first_block: tl.int64,
    seed: tl.uint64,
    layer: tl.uint32,
    step: tl.uint32,
    unit: tl.float32,
    beta1: tl.float32,
    beta2: tl.float32,
    rate: tl.float32,  # divided by the bias correction of m
    root_scale: tl.float32,  # one over the root of the bias correction of v
    shift: tl.float32,
    SHIFT_IN_MEMORY: tl.constexpr,
    FAST_MATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    local = program * BLOCK + tl.arange(0, BLOCK) - skip
    valid = (local >= 0) & (local < count)
    words = random_words(first_block + program * (BLOCK // 4) + tl.arange(0, BLOCK // 4), seed, layer, step)
    grad = tl.load(grad_ptr + local, mask=valid, other=0.0).to(tl.float32)
    bits = tl.load(moments_ptr + local, mask=valid, other=0).to(tl.int32) + 32768
    old = grid_value(bits >> 6)
    # The multiple becomes the lowest bits of a number near 2**23.
    multiple = ((bits & 63) | 0x4B000000).to(tl.float32, bitcast=True) - 8388640.0
    m = multiple * tl.sqrt(old) * (unit * beta1) + grad * (1.0 - beta1)
    v = old * beta2 + grad * grad * (1.0 - beta2)
    tl.store(moments_ptr + local, pack_moments(m, v, unit, words, FAST_MATH), mask=valid)
    moved = tl.load(logits_ptr + local, mask=valid, other=0.0).to(tl.float32)
    shared = tl.load(shift_ptr).to(tl.float32) if SHIFT_IN_MEMORY else shift
    moved -= rate * divide(m, tl.sqrt(v) * root_scale + 1e-8, FAST_MATH) + shared
    if logits_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(logits_ptr + local, round_to_bf16(moved, words >> 16), mask=valid)
    else:
        tl.store(logits_ptr + local, moved, mask=valid)


_launch = Launcher(adam8bit_kernel)


def adam8bit_triton(logits: Tensor, grad: Tensor, moments: Tensor, s: AdamStep) -> None:
    """:func:`leap_kernels.adam8bit.adam8bit` for tensors that fit."""
    skip, count = s.offset & 3, logits.numel()
    correction1, correction2 = s.corrections
    shift, number = (s.shift, 0.0) if isinstance(s.shift, Tensor) else (None, s.shift)
    _launch(
        -(-(skip + count) // _BLOCK),
        (logits, grad.contiguous(), moments),
        (count, skip),
        (shift is not None, has_fast_math(logits), _BLOCK),
        4,
        numbers=(
            s.offset >> 2,
            s.seed,
            s.layer,
            s.step,
            s.unit,
            *s.betas,
            s.rate / correction1,
            1 / math.sqrt(correction2),
            number,
        ),
        singles=(logits if shift is None else shift,),
        types=(logits.dtype, grad.dtype, None if shift is None else shift.dtype),
    )
