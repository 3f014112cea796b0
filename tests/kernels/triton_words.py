"""The random words as the Triton kernels draw them, for tests on a GPU and in the interpreter."""

import torch
import triton
import triton.language as tl
from leap_kernels.triton_noise import random_words
from torch import Tensor

_BLOCK = 1024


@triton.jit(do_not_specialize=["seed", "layer", "step"])
def _words_kernel(out_ptr, count, first_block, skip, seed, layer, step, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    local = program * BLOCK + tl.arange(0, BLOCK) - skip
    words = random_words(first_block + program * (BLOCK // 4) + tl.arange(0, BLOCK // 4), seed, layer, step)
    tl.store(out_ptr + local, words.to(tl.int32, bitcast=True), mask=(local >= 0) & (local < count))


def words_by_triton(count: int, device: str, *, seed: int, layer: int, step: int, offset: int) -> Tensor:
    """As :func:`leap_kernels.mask_ops.random_words`: int32 [count]."""
    out = torch.zeros(count, dtype=torch.int32, device=device)
    skip = offset & 3
    _words_kernel[(triton.cdiv(count + skip, _BLOCK),)](out, count, offset >> 2, skip, seed, layer, step, BLOCK=_BLOCK)
    return out
