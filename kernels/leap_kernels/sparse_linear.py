"""Linear layers whose weight is a BMP128 matrix."""

import torch
from torch import Tensor

from leap_kernels import gemv_bitmap_cpu
from leap_kernels.bmp128 import BMP128

# Rows of x up to which a kernel that reads the packed weight is used; beyond, arithmetic and not bytes set the pace.
# On GPUs the kernel reads the weight once per row, and only the first time from memory; 4 is a guess, not measured.
MAX_SPARSE_ROWS = 16
MAX_SPARSE_ROWS_CUDA = 4


def sparse_linear_reference(x: Tensor, weight: BMP128) -> Tensor:
    """``x @ W.T`` in float64 through the dense matrix: what the kernels are tested against."""
    return x.double() @ weight.unpack().double().T


def sparse_linear(x: Tensor, weight: BMP128, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``.

    x: [..., K], dtype and device those of weight. bias: [N] of that dtype. Returns [..., N].

    For few rows of x, as in decoding, a kernel reads the packed bytes: on a CPU native code (MAX_SPARSE_ROWS rows,
    float32 and bfloat16), on a GPU Triton (MAX_SPARSE_ROWS_CUDA rows). Sums are float32 and do not depend on the number
    of threads. In all other cases, and where x wants a gradient, the matrix is unpacked for the call. Not
    differentiable with respect to weight. Raises ValueError for arguments that do not fit.
    """
    rows, columns = weight.shape
    if x.dtype != weight.vals.dtype or x.device != weight.vals.device or x.shape[-1] != columns:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}; weight {weight.vals.dtype} [{rows}, {columns}] "
            f"on {weight.vals.device}"
        )
    flat = x.reshape(-1, columns)
    y = None
    if not (torch.is_grad_enabled() and x.requires_grad):
        if x.is_cuda and 1 <= flat.shape[0] <= MAX_SPARSE_ROWS_CUDA:
            from leap_kernels.gemv_bitmap_triton import gemv_bitmap_triton  # Triton is not on every platform

            y = gemv_bitmap_triton(flat, weight)
        elif x.device.type == "cpu" and x.dtype in gemv_bitmap_cpu.DTYPES and 1 <= flat.shape[0] <= MAX_SPARSE_ROWS:
            library = gemv_bitmap_cpu.native_library()
            y = None if library is None else gemv_bitmap_cpu.gemv_bitmap_cpu(flat, weight, library)
    if y is None:
        return torch.nn.functional.linear(x, weight.unpack(), bias)
    y = y.view(*x.shape[:-1], rows)
    return y if bias is None else y + bias
