"""The step of one number a matrix on a GPU; see :mod:`leap_kernels.shared_step` for the contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.adam8bit import EPS
from leap_kernels.shared_step import factors


@triton.jit
def shared_step_kernel(total_ptr, moments_ptr, step_ptr, beta1, beta2, factor, root_scale, eps):
    g = tl.load(total_ptr)
    m = tl.load(moments_ptr) * beta1 + g * (1.0 - beta1)
    v = tl.load(moments_ptr + 1) * beta2 + g * g * (1.0 - beta2)
    tl.store(moments_ptr, m)
    tl.store(moments_ptr + 1, v)
    tl.store(step_ptr, factor * m / (tl.sqrt(v) * root_scale + eps))


def shared_step_triton(total: Tensor, moments: Tensor, rate: float, betas: tuple[float, float], step: int) -> Tensor:
    """:func:`leap_kernels.shared_step.shared_step` for tensors of a GPU; the factors are rounded to float32."""
    taken = torch.empty((), dtype=torch.float64, device=total.device)
    with torch.cuda.device_of(total):
        shared_step_kernel[(1,)](total, moments, taken, *betas, *factors(rate, betas, step), EPS, num_warps=1)
    return taken
