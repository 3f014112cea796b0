"""``M * W`` and its sums on a GPU; see :mod:`leap_kernels.mask_ops` for the contract."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.mask_reference import MaskScalars
from leap_kernels.triton_launch import Launcher
from leap_kernels.triton_noise import has_fast_math, logistic_noise, sigmoid


class Config(NamedTuple):
    """How a program goes about its weights."""

    block: int
    """Weights at a time."""
    tiles: int
    """Times. The sums over all of them are brought together once, which takes some 4 instructions a weight of one."""
    warps: int


@triton.jit
def add_three(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit(do_not_specialize=["first_block", "seed", "layer", "step", "scale", "inverse_temperature"])
def mask_forward_kernel(
    weight_ptr,
    logits_ptr,
    out_ptr,
    partial_ptr,  # float32 [3, programs]
    count,
    skip,  # elements of first_block that belong to the weights before this shard
    first_block: tl.int64,
    seed: tl.uint64,
    layer: tl.uint32,
    step: tl.uint32,
    scale: tl.float32,
    inverse_temperature: tl.float32,
    NOISE: tl.constexpr,
    FAST_MATH: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    PARTS: tl.constexpr = 8  # neighbours, which a thread adds up by itself
    program = tl.program_id(0).to(tl.int64)
    mask_sum = tl.zeros([BLOCK // PARTS], tl.float32)
    square_sum = tl.zeros([BLOCK // PARTS], tl.float32)
    density_sum = tl.zeros([BLOCK // PARTS], tl.float32)
    for tile in range(TILES):
        first = (program * TILES + tile) * BLOCK
        local = first + tl.arange(0, BLOCK) - skip
        valid = (local >= 0) & (local < count)
        weight = tl.load(weight_ptr + local, mask=valid, other=0.0).to(tl.float32)
        # Logits of -infinity where there is no weight: mask and density are exactly 0 there and add nothing.
        scaled = tl.load(logits_ptr + local, mask=valid, other=float("-inf")).to(tl.float32) * scale
        z = scaled
        if NOISE:
            block = first_block + first // 4 + tl.arange(0, BLOCK // 4)
            z += logistic_noise(block, seed, layer, step, FAST_MATH)
        mask = sigmoid(z, inverse_temperature, FAST_MATH)
        density = sigmoid(scaled, 1.0, FAST_MATH)
        masked = mask * weight
        tl.store(out_ptr + local, masked.to(out_ptr.dtype.element_ty), mask=valid)
        mask_sum += tl.sum(tl.reshape(mask, [BLOCK // PARTS, PARTS]), 1)
        square_sum += tl.sum(tl.reshape(masked * masked, [BLOCK // PARTS, PARTS]), 1)
        density_sum += tl.sum(tl.reshape(density, [BLOCK // PARTS, PARTS]), 1)
    mask_total, square_total, density_total = tl.reduce((mask_sum, square_sum, density_sum), 0, add_three)
    programs = tl.num_programs(0)
    tl.store(partial_ptr + program, mask_total)
    tl.store(partial_ptr + programs + program, square_total)
    tl.store(partial_ptr + 2 * programs + program, density_total)


_launch = Launcher(mask_forward_kernel)


def default_config(count: int) -> Config:
    """For a matrix of so many weights: smaller ones need more programs to keep a large GPU busy."""
    return Config(2048, 4 if count >= 1 << 23 else 1, 4)


def candidates() -> list[Config]:
    """Configurations worth timing on a large matrix."""
    return [Config(2048, 4, 4), Config(2048, 1, 4), Config(4096, 4, 8)]


def mask_forward_triton(
    weight: Tensor, logits: Tensor, out: Tensor, scalars: MaskScalars, config: Config | None = None
) -> Tensor:
    """Write ``M * W`` to ``out`` and return stats, float64 [3]. All tensors contiguous and of one shape."""
    skip, count = scalars.offset & 3, weight.numel()
    block, tiles, warps = default_config(count) if config is None else config
    programs = -(-(skip + count) // (block * tiles))
    partial = torch.empty(3, programs, dtype=torch.float32, device=weight.device)
    _launch(
        programs,
        (weight, logits, out, partial),
        (count, skip),
        (scalars.noise, has_fast_math(weight), block, tiles),
        warps,
        numbers=scalars.numbers,
        types=(weight.dtype, logits.dtype),
    )
    return partial.sum(dim=1, dtype=torch.float64)
