"""Adam on one number a matrix, kept on the device: nobody has to wait for the number.

With g the sum of a matrix's gradient: m ← β1·m + (1 − β1)·g, v ← β2·v + (1 − β2)·g², and the step is
rate · m̂ / (√v̂ + ε), the hats for bias-corrected (Kingma and Ba, arXiv 1412.6980). In PyTorch these are a dozen
operations on single numbers, which on a GPU take longer to start than a small matrix takes to update.
"""

import math

from torch import Tensor

from leap_kernels.adam8bit import EPS


def shared_step(total: Tensor, moments: Tensor, rate: float, betas: tuple[float, float], step: int) -> Tensor:
    """The step, float64 [], and ``moments`` moved in place.

    Args:
        total: g, float64 [].
        moments: m and v, float64 [2], 0 at first.
        step: from 0.
    """
    if not total.is_cuda:
        return shared_step_reference(total, moments, rate, betas, step)
    from leap_kernels.shared_step_triton import shared_step_triton  # here, because Triton is not on every platform

    return shared_step_triton(total, moments, rate, betas, step)


def shared_step_reference(total: Tensor, moments: Tensor, rate: float, betas: tuple[float, float], step: int) -> Tensor:
    """:func:`shared_step` in plain PyTorch."""
    beta1, beta2 = betas
    m, v = moments.unbind()
    m.copy_(beta1 * m + (1 - beta1) * total)
    v.copy_(beta2 * v + (1 - beta2) * total * total)
    factor, root_scale = factors(rate, betas, step)
    return factor * m / (v.sqrt() * root_scale + EPS)


def factors(rate: float, betas: tuple[float, float], step: int) -> tuple[float, float]:
    """What m and √v are multiplied by: the rate and the bias corrections."""
    correction1, correction2 = (1 - beta ** (step + 1) for beta in betas)
    return rate / correction1, 1 / math.sqrt(correction2)
