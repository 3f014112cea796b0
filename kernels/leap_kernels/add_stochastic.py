"""A running sum in bfloat16 that keeps its mean: each addition is rounded up or down at random.

With the nearest value, what is less than half the sum's spacing would be lost every time. The random words are those of
:mod:`leap_kernels.philox`, so a slice of a matrix gets what the whole does.

CUDA tensors run a Triton kernel, all others the PyTorch reference; the two agree bit for bit.
"""

import torch
from torch import Tensor

from leap_kernels.adam8bit import chunks, round_to_bf16
from leap_kernels.mask_ops import random_words
from leap_kernels.philox import check_stream


def add_stochastic(total: Tensor, term: Tensor, *, seed: int, layer: int, step: int, offset: int = 0) -> None:
    """Add ``term`` to ``total`` in place.

    Args:
        total: [n], bfloat16, contiguous.
        term: [n], any float dtype.
        seed, layer, step: the counter of the random words, of which every element takes its own.
        offset: flat index of the slice's first element in the whole matrix.

    Raises:
        ValueError: dtypes or shapes that do not fit, or a counter out of range.
    """
    if total.dtype != torch.bfloat16 or not total.is_contiguous():
        raise ValueError(f"the total must be bfloat16 and contiguous, not {total.dtype}")
    if total.shape != term.shape or total.ndim != 1:
        raise ValueError(f"flat slices of one length, not {[list(t.shape) for t in (total, term)]}")
    check_stream(seed, layer, step, offset)
    if total.is_cuda:
        from leap_kernels.add_stochastic_triton import add_stochastic_triton  # Triton is not on every platform

        add_stochastic_triton(total, term, seed, layer, step, offset)
    else:
        add_stochastic_reference(total, term, seed=seed, layer=layer, step=step, offset=offset)


def add_stochastic_reference(total: Tensor, term: Tensor, *, seed: int, layer: int, step: int, offset: int) -> None:
    """:func:`add_stochastic` in plain PyTorch."""
    for part in chunks(total):
        words = random_words(
            part.stop - part.start,
            seed=seed,
            layer=layer,
            step=step,
            offset=offset + part.start,
            device=total.device,
        )
        total[part] = round_to_bf16(total[part].float() + term[part].float(), words)
