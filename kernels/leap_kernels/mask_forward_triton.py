"""``M * W`` and its sums on a GPU; see :mod:`leap_kernels.mask_ops` for the contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.mask_reference import MaskScalars
from leap_kernels.triton_noise import has_fast_math, logistic_noise, sigmoid_and_slope

# Elements per program: four Philox blocks for each of 128 threads. Half of it costs a tenth more instructions per
# weight, double it saves nothing (aot.py, sm_90).
_BLOCK = 2048


@triton.jit(do_not_specialize=["seed", "layer", "step"])
def mask_forward_kernel(
    weight_ptr,
    logits_ptr,
    out_ptr,
    partial_ptr,  # float32 [programs, 3]
    count,
    first_block,
    skip,  # elements of first_block that belong to the weights before this shard
    seed,
    layer,
    step,
    scale,
    inverse_temperature,
    NOISE: tl.constexpr,
    FAST_MATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    local = program * BLOCK + tl.arange(0, BLOCK) - skip
    valid = (local >= 0) & (local < count)
    weight = tl.load(weight_ptr + local, mask=valid, other=0.0).to(tl.float32)
    # Logits of -infinity where there is no weight: mask and density are exactly 0 there and add nothing to the sums.
    scaled = tl.load(logits_ptr + local, mask=valid, other=float("-inf")).to(tl.float32) * scale
    z = scaled
    if NOISE:
        block = first_block + program * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        z += logistic_noise(block, seed, layer, step, FAST_MATH)
    mask, _ = sigmoid_and_slope(z * inverse_temperature, FAST_MATH)
    density, _ = sigmoid_and_slope(scaled, FAST_MATH)
    masked = mask * weight
    tl.store(out_ptr + local, masked.to(out_ptr.dtype.element_ty), mask=valid)
    tl.store(partial_ptr + 3 * program, tl.sum(mask))
    tl.store(partial_ptr + 3 * program + 1, tl.sum(masked * masked))
    tl.store(partial_ptr + 3 * program + 2, tl.sum(density))


def mask_forward_triton(weight: Tensor, logits: Tensor, out: Tensor, scalars: MaskScalars) -> Tensor:
    """Write ``M * W`` to ``out`` and return stats, float64 [3]. All tensors contiguous and of one shape."""
    skip = scalars.offset & 3
    programs = triton.cdiv(skip + weight.numel(), _BLOCK)
    partial = torch.empty(programs, 3, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        mask_forward_kernel[(programs,)](
            weight,
            logits,
            out,
            partial,
            weight.numel(),
            scalars.offset >> 2,
            skip,
            scalars.seed,
            scalars.layer,
            scalars.step,
            scalars.scale,
            1 / scalars.temperature,
            NOISE=scalars.noise,
            FAST_MATH=has_fast_math(weight),
            BLOCK=_BLOCK,
        )
    return partial.sum(dim=0, dtype=torch.float64)
