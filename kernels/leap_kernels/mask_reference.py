"""Relaxed-mask forward and backward in plain PyTorch: the definition, and the path where no compiler is at hand.

With P the logits, W the frozen weight and g logistic noise (:mod:`leap_kernels.philox`) or 0:

    M            = sigmoid((scale * P + g) / temperature)
    masked       = M * W
    stats        = [sum M, sum (M W)^2, sum sigmoid(scale * P)]
    dL/dP        = (dL/dmasked * W + s0 + 2 s1 M W^2) M (1 - M) scale / temperature
                   + s2 sigmoid'(scale * P) scale                                   with s = dL/dstats

Both functions walk over chunks, so the temporaries stay at a few MB whatever the size of the matrix.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from leap_kernels.philox import check_stream, logistic_noise

# Also the granularity of the partial sums. torch splits reductions of 32768 elements and more over its threads, which
# would make the sums depend on their number.
_CHUNK = 16384


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskScalars:
    """The numbers that, with W and P, determine a sampled mask. Raises ValueError for ones outside their range."""

    scale: float
    """Multiplies the logits; positive."""
    temperature: float
    """Divides the noisy logits; positive."""
    seed: int
    """Key of the noise, < 2**64."""
    layer: int
    """Which weight matrix, < 2**32."""
    step: int
    """Which sample, < 2**32; another one for every micro-batch."""
    noise: bool
    """Sample logistic noise; False takes g = 0."""
    offset: int = 0
    """Flat index of the first element in the whole weight matrix."""

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("temperature", self.temperature)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value} must be positive and finite")
        check_stream(self.seed, self.layer, self.step, self.offset)

    @property
    def numbers(self) -> tuple[int, int, int, int, float, float]:
        """What the GPU's kernels take of them: the offset in blocks of noise, its stream, κ and 1 / τ."""
        return self.offset >> 2, self.seed, self.layer, self.step, self.scale, 1 / self.temperature


def _pre_activations(logits: Tensor, first: int, scalars: MaskScalars, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale * P, (scale * P + g) / temperature) of the flat chunk of logits that starts at local index ``first``."""
    scaled = logits.to(dtype) * scalars.scale
    if not scalars.noise:
        return scaled, scaled / scalars.temperature
    noise = logistic_noise(
        logits.numel(),
        seed=scalars.seed,
        layer=scalars.layer,
        step=scalars.step,
        offset=scalars.offset + first,
        dtype=dtype,
        device=logits.device,
    )
    return scaled, (scaled + noise) / scalars.temperature


def _slope(z: Tensor) -> Tensor:
    """sigmoid(z) (1 - sigmoid(z)), without the cancellation of the second factor for large z."""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def mask_forward_reference(
    weight: Tensor, logits: Tensor, out: Tensor, scalars: MaskScalars, *, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Write ``M * W`` to ``out`` and return stats, float64 [3]. All tensors contiguous and of one shape."""
    stats = torch.zeros(3, dtype=torch.float64, device=weight.device)
    flat_weight, flat_logits, flat_out = weight.detach().view(-1), logits.detach().view(-1), out.detach().view(-1)
    for first in range(0, flat_weight.numel(), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        scaled, z = _pre_activations(flat_logits[chunk], first, scalars, compute_dtype)
        mask = torch.sigmoid(z)
        masked = mask * flat_weight[chunk].to(compute_dtype)
        flat_out[chunk] = masked
        sums = (mask, masked * masked, torch.sigmoid(scaled))
        stats += torch.stack([term.sum(dtype=torch.float64) for term in sums])
    return stats


def mask_backward_reference(
    grad_masked_weight: Tensor,
    weight: Tensor,
    logits: Tensor,
    stats_grad: Tensor,
    out: Tensor,
    scalars: MaskScalars,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Write dL/dP to ``out``, which may be ``grad_masked_weight`` itself. stats_grad: [3]; the rest as in forward."""
    s0, s1, s2 = stats_grad.to(compute_dtype).unbind()
    flat_grad, flat_out = grad_masked_weight.detach().view(-1), out.detach().view(-1)
    flat_weight, flat_logits = weight.detach().view(-1), logits.detach().view(-1)
    for first in range(0, flat_weight.numel(), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        scaled, z = _pre_activations(flat_logits[chunk], first, scalars, compute_dtype)
        w = flat_weight[chunk].to(compute_dtype)
        grad_mask = (flat_grad[chunk].to(compute_dtype) + 2 * s1 * torch.sigmoid(z) * w) * w + s0
        slope_factor = scalars.scale / scalars.temperature
        flat_out[chunk] = grad_mask * _slope(z) * slope_factor + s2 * _slope(scaled) * scalars.scale
