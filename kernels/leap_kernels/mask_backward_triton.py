"""dL/dP of the sampled mask on a GPU; see :mod:`leap_kernels.mask_ops` for the contract."""

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
def mask_backward_kernel(
    grad_ptr,
    weight_ptr,
    logits_ptr,
    stats_grad_ptr,  # float32 [3]
    out_ptr,
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
    grad = tl.load(grad_ptr + local, mask=valid, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + local, mask=valid, other=0.0).to(tl.float32)
    scaled = tl.load(logits_ptr + local, mask=valid, other=0.0).to(tl.float32) * scale
    z = scaled
    if NOISE:
        block = first_block + program * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        z += logistic_noise(block, seed, layer, step, FAST_MATH)
    mask, slope = sigmoid_and_slope(z * inverse_temperature, FAST_MATH)
    _, density_slope = sigmoid_and_slope(scaled, FAST_MATH)
    grad_mask = (grad + 2.0 * tl.load(stats_grad_ptr + 1) * mask * weight) * weight + tl.load(stats_grad_ptr)
    result = grad_mask * slope * (scale * inverse_temperature)
    result += tl.load(stats_grad_ptr + 2) * density_slope * scale
    tl.store(out_ptr + local, result.to(out_ptr.dtype.element_ty), mask=valid)


def mask_backward_triton(
    grad_masked_weight: Tensor, weight: Tensor, logits: Tensor, stats_grad: Tensor, out: Tensor, scalars: MaskScalars
) -> None:
    """Write dL/dP to ``out``, which may be ``grad_masked_weight`` itself. stats_grad: [3]; all else of one shape."""
    skip = scalars.offset & 3
    with torch.cuda.device_of(weight):
        mask_backward_kernel[(triton.cdiv(skip + weight.numel(), _BLOCK),)](
            grad_masked_weight,
            weight,
            logits,
            stats_grad.to(weight.device, torch.float32).contiguous(),
            out,
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
