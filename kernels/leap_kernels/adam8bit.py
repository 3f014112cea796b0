"""One step of Adam with both moments packed into 16 bits, in place, on a flat slice of logits.

The packed format of the moments (Adam: Kingma and Ba, arXiv 1412.6980):

- v is stored on a geometric grid, 10 bits at 12 values an octave from 2**-68 to 2**17, and 0;
- m is stored as a multiple of √v, which bounds it: by Cauchy and Schwarz
  |m| ≤ (1 − β1) / √((1 − β2)(1 − β1²/β2)) · √v. 6 bits divide that range evenly, so what an update can be wrong by is
  the same share of the learning rate for every logit, however small its gradient.

The block-wise format of Dettmers et al. (arXiv 2110.02861) costs as much and ties state to where blocks begin. Rounding
is stochastic, with the counter-based generator of the masks' noise: with nearest values, decay by less than half a grid
step would never take place, neither would updates of bfloat16 logits.

CPU tensors run native C++ (:mod:`leap_kernels.native`) and CUDA tensors a Triton kernel, which pass over memory once;
everything else, and CPUs without a compiler, the PyTorch reference. The random words are the same everywhere, bit for
bit; what comes of them agrees to float32 rounding, so that a moment or a bfloat16 logit on the verge of its neighbour
may be that neighbour: in fewer than one of two thousand. In each, the elements of a slice are those of the whole matrix
bit for bit, whatever the number of threads.
"""

import ctypes
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leap_kernels import native
from leap_kernels.mask_ops import random_words

EPS = 1e-8
"""Added to √v, as in the paper."""
_FLOOR = 2.0**-68  # smallest v above 0
_PER_OCTAVE = 12
_CODES, _ZERO = 1024, 32
NO_MOMENTS = _ZERO - (1 << 15)
"""Packed v = 0, m = 0."""
_LOGITS_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class AdamStep:
    """What a step is made of besides its tensors."""

    rate: float
    betas: tuple[float, float]
    """With β1² < β2, without which m has no bound, and β2 ≤ 0.99, above which rounding would drown v."""
    seed: int
    layer: int
    step: int
    """From 0; with seed and layer the counter of the random words, of which every element takes its own."""
    offset: int = 0
    """Flat index of the slice's first element in the whole matrix."""
    shift: float | Tensor = 0.0
    """What every logit moves down by besides; as a tensor [] on the device of the logits, nobody has to wait for it."""

    @property
    def unit(self) -> float:
        """Step of m's grid relative to √v: its bound in 31 parts."""
        beta1, beta2 = self.betas
        return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2)) / (_ZERO - 1)

    @property
    def corrections(self) -> tuple[float, float]:
        """1 − β^(t + 1) for both moments."""
        return 1 - self.betas[0] ** (self.step + 1), 1 - self.betas[1] ** (self.step + 1)


def adam8bit(logits: Tensor, grad: Tensor, moments: Tensor, s: AdamStep) -> None:
    """Move ``logits`` and ``moments`` in place: logits −= rate · m̂ / (√v̂ + ε) + shift.

    Args:
        logits: [n], fp32 or bfloat16 (rounded stochastically), contiguous.
        grad: [n], any float dtype.
        moments: int16 [n], ``NO_MOMENTS`` at first.

    Raises:
        ValueError: dtypes or shapes that do not fit.
    """
    if logits.dtype not in _LOGITS_DTYPES or moments.dtype != torch.int16:
        raise ValueError(f"logits must be float32 or bfloat16 and moments int16, not {logits.dtype}, {moments.dtype}")
    if not logits.shape == grad.shape == moments.shape or logits.ndim != 1:
        raise ValueError(f"flat slices of one length, not {[list(t.shape) for t in (logits, grad, moments)]}")
    if not (logits.is_contiguous() and moments.is_contiguous()):
        raise ValueError("logits and moments must be contiguous")
    if logits.is_cuda and grad.dtype in native.DTYPE_CODES:
        from leap_kernels.adam8bit_triton import adam8bit_triton  # Triton is not on every platform

        adam8bit_triton(logits, grad, moments, s)
        return
    has_code = logits.device.type == "cpu" and grad.dtype in native.DTYPE_CODES
    library = native_library() if has_code else None
    if library is None:
        adam8bit_reference(logits, grad, moments, s)
        return
    grad = grad.contiguous()
    correction1, correction2 = s.corrections
    library.leap_adam8bit(
        logits.data_ptr(), native.DTYPE_CODES[logits.dtype], grad.data_ptr(), native.DTYPE_CODES[grad.dtype],
        moments.data_ptr(), logits.numel(), s.offset, s.unit, *s.betas,
        s.rate / correction1, 1 / math.sqrt(correction2), float(s.shift), s.seed, s.layer, s.step,
        torch.get_num_threads(),
    )  # fmt: skip


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """``native/adam8bit.cpp``, or None where it cannot be built."""
    library = native.load("adam8bit", tune_for_host=True)
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_float
        tensors: list[Any] = [pointer, ctypes.c_int, pointer, ctypes.c_int, pointer, ctypes.c_int64, ctypes.c_int64]
        stream: list[Any] = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
        library.leap_adam8bit.argtypes = [*tensors, *[number] * 6, *stream, ctypes.c_int]
        library.leap_adam8bit.restype = None
    return library


def adam8bit_reference(logits: Tensor, grad: Tensor, moments: Tensor, s: AdamStep) -> None:
    """:func:`adam8bit` in plain PyTorch."""
    beta1, beta2 = s.betas
    correction1, correction2 = s.corrections
    for part in chunks(logits):
        words = random_words(
            part.stop - part.start,
            seed=s.seed,
            layer=s.layer,
            step=s.step,
            offset=s.offset + part.start,
            device=logits.device,
        )
        g = grad[part].float()
        m, v = unpack_moments(moments[part], s.unit)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        moments[part] = pack_moments(m, v, s.unit, words)
        update = m / v.sqrt().div_(math.sqrt(correction2)).add_(EPS) * (s.rate / correction1) + s.shift
        moved = logits[part].float() - update
        logits[part] = moved if logits.dtype == torch.float32 else round_to_bf16(moved, words >> 16)


def pack_moments(m: Tensor, v: Tensor, unit: float, words: Tensor) -> Tensor:
    """int16 [n] from fp32 m and v [n], rounded so that the mean of v is kept, and that of m given the rounded v.

    Args:
        unit: step of m's grid relative to √v.
        words: random int32 [n], of which the low 16 bits are used.
    """
    grid, roots = _tables(v.device)
    code = (torch.searchsorted(grid[:_CODES], v, right=True) - 1).clamp_(0, _CODES - 1)
    low = grid[code]
    code = (code + (v - low > (grid[code + 1] - low) * _middle(words))).clamp_(max=_CODES - 1)
    multiple = (m / (roots[code] * unit)).nan_to_num_(0.0, 0.0, 0.0)  # m is given up where v rounds to 0
    multiple = (multiple + _middle(words >> 8)).floor_().clamp_(1 - _ZERO, _ZERO - 1)
    return (code * 64 + multiple.int() + NO_MOMENTS).to(torch.int16)


def unpack_moments(packed: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """fp32 m and v [n] from :func:`pack_moments`."""
    grid, roots = _tables(packed.device)
    bits = packed.to(torch.int32) + (1 << 15)
    code = (bits >> 6).long()
    return ((bits & 63) - _ZERO).float() * unit * roots[code], grid[code]


def round_to_bf16(x: Tensor, words: Tensor) -> Tensor:
    """Finite fp32 [n] to bfloat16, up or down at random with the mean kept; the low 16 bits of ``words`` are used."""
    return ((x.view(torch.int32) + (words & 0xFFFF)) & -0x10000).view(torch.float32).to(torch.bfloat16)


def chunks(tensor: Tensor) -> Iterator[slice]:
    """Parts of a flat tensor whose temporaries are small, and on a CPU stay in its caches."""
    size = 1 << (16 if tensor.device.type == "cpu" else 24)
    return (slice(first, min(first + size, len(tensor))) for first in range(0, len(tensor), size))


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """v by code [1025], the last one bounding the gap above the greatest, and its root [1024], fp32."""
    codes = torch.arange(_CODES + 1, dtype=torch.float64)
    grid = torch.where(codes > 0, torch.exp2((codes - 1) / _PER_OCTAVE) * _FLOOR, 0)
    return grid.float().to(device), grid[:_CODES].sqrt().float().to(device)


def _middle(words: Tensor) -> Tensor:
    """Middles of 256 equal parts of (0, 1), by the lowest byte."""
    return ((words & 0xFF).float() + 0.5) / 256
