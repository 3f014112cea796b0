"""dL/dP of the sampled mask on a GPU; see :mod:`leap_kernels.mask_ops` for the contract."""

import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.mask_reference import MaskScalars
from leap_kernels.triton_launch import Launcher
from leap_kernels.triton_noise import has_fast_math, logistic_noise, sigmoid_and_slope, slope_of_sigmoid

# Elements per program: four Philox blocks for each of 128 threads. Half of it costs a tenth more instructions per
# weight, double it saves nothing (aot.py, sm_90).
_BLOCK = 2048


@triton.jit(
    do_not_specialize=["stats_grad_ptr", "first_block", "seed", "layer", "step", "scale", "inverse_temperature"]
)
def mask_backward_kernel(
    grad_ptr,
    weight_ptr,
    logits_ptr,
    out_ptr,
    stats_grad_ptr,  # [3]
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
    of_mask = tl.load(stats_grad_ptr).to(tl.float32)
    of_square = tl.load(stats_grad_ptr + 1).to(tl.float32) * 2.0
    of_density = tl.load(stats_grad_ptr + 2).to(tl.float32) * scale
    grad_mask = (grad + of_square * mask * weight) * weight + of_mask
    result = grad_mask * slope * (scale * inverse_temperature) + of_density * slope_of_sigmoid(scaled, FAST_MATH)
    tl.store(out_ptr + local, result.to(out_ptr.dtype.element_ty), mask=valid)


_launch = Launcher(mask_backward_kernel)


def mask_backward_triton(
    grad_masked_weight: Tensor, weight: Tensor, logits: Tensor, stats_grad: Tensor, out: Tensor, scalars: MaskScalars
) -> None:
    """Write dL/dP to ``out``, which may be ``grad_masked_weight`` itself. stats_grad: [3]; all else of one shape."""
    skip, count = scalars.offset & 3, weight.numel()
    _launch(
        -(-(skip + count) // _BLOCK),
        (grad_masked_weight, weight, logits, out),
        (count, skip),
        (scalars.noise, has_fast_math(weight), _BLOCK),
        4,
        numbers=scalars.numbers,
        singles=(stats_grad.to(weight.device).contiguous(),),
        types=(grad_masked_weight.dtype, weight.dtype, logits.dtype, stats_grad.dtype),
    )
