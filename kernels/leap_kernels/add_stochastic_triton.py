"""Stochastically rounded addition on a GPU; see :mod:`leap_kernels.add_stochastic` for the contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.triton_noise import random_words, round_to_bf16

# Elements per program: two Philox blocks for each of 128 threads.
_BLOCK = 1024


@triton.jit(do_not_specialize=["seed", "layer", "step"])
def add_stochastic_kernel(
    total_ptr,
    term_ptr,
    count,
    first_block,
    skip,  # elements of first_block that belong to the weights before this slice
    seed,
    layer,
    step,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    local = program * BLOCK + tl.arange(0, BLOCK) - skip
    valid = (local >= 0) & (local < count)
    words = random_words(first_block + program * (BLOCK // 4) + tl.arange(0, BLOCK // 4), seed, layer, step)
    total = tl.load(total_ptr + local, mask=valid, other=0.0).to(tl.float32)
    total += tl.load(term_ptr + local, mask=valid, other=0.0).to(tl.float32)
    tl.store(total_ptr + local, round_to_bf16(total, words), mask=valid)


def add_stochastic_triton(total: Tensor, term: Tensor, seed: int, layer: int, step: int, offset: int) -> None:
    """:func:`leap_kernels.add_stochastic.add_stochastic` for tensors that fit."""
    skip = offset & 3
    with torch.cuda.device_of(total):
        add_stochastic_kernel[(triton.cdiv(skip + total.numel(), _BLOCK),)](
            total, term.contiguous(), total.numel(), offset >> 2, skip, seed, layer, step, BLOCK=_BLOCK
        )
