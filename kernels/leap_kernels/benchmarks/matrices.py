"""Packed matrices to measure with."""

import torch

from leap_kernels.bmp128 import BMP128, pack
from leap_kernels.idx8 import IDX8

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 4096))
"""[out, in] of an 8B Llama's layers: q and o, down, gate and up, k and v."""


def random_matrix(shape: tuple[int, int], sparsity: float, dtype: torch.dtype, device: torch.device) -> BMP128:
    """Normal weights under a random mask; the same on every card, not on every kind of device."""
    generator = torch.Generator(device).manual_seed(shape[0] * 31 + shape[1])
    weight = torch.randn(shape, generator=generator, device=device).to(dtype)
    return pack(weight, torch.rand(shape, generator=generator, device=device) >= sparsity)


def copied(matrix: BMP128 | IDX8) -> BMP128 | IDX8:
    """The same matrix in memory of its own."""
    if isinstance(matrix, IDX8):
        return IDX8(matrix.shape, *(tensor.clone() for tensor in matrix.tensors().values()))
    row_base = None if matrix.row_base is None else matrix.row_base.clone()
    return BMP128(matrix.shape, matrix.bits.clone(), matrix.off.clone(), matrix.vals.clone(), row_base)
