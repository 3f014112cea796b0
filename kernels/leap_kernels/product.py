"""The product with a packed matrix as it runs: the op that :mod:`leap_kernels.dispatch` chooses, at once."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from leap_kernels import gemv_bitmap_cpu
from leap_kernels.bmp128 import BMP128
from leap_kernels.dispatch import Op, choose_op
from leap_kernels.idx8 import IDX8
from leap_kernels.unpack_bitmap_cpu import unpack_bitmap_cpu


def product(x: Tensor, weight: BMP128 | IDX8, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``: :func:`leap_kernels.sparse_linear` outside of autocast and of a trace."""
    rows, columns = weight.shape
    vals = weight.vals
    device = x.device
    # All of this is done for every layer of every token, and a reshape takes as long as a hundred kilobytes.
    if x.dtype != vals.dtype or device != vals.device or x.shape[-1] != columns:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {device}; weight {vals.dtype} [{rows}, {columns}] on {vals.device}"
        )
    device_type = device.type
    library = gemv_bitmap_cpu.native_library() if device_type == "cpu" else None
    op = choose_op(
        device_type,
        x.numel() // columns if columns else 0,
        x.dtype,
        matrix_format="idx8" if isinstance(weight, IDX8) else "bmp128",
        native=library is not None,
        differentiable=x.requires_grad and torch.is_grad_enabled(),
    )
    if op == "dense":
        return linear(x, dense(weight), bias)
    if library is not None and isinstance(weight, BMP128):
        y = gemv_bitmap_cpu.gemv_bitmap_cpu(x, weight, library)
        return y if bias is None else y + bias
    return _triton_products()[op](x, weight, bias)


@functools.cache
def _triton_products() -> dict[Op, Callable[..., Tensor]]:
    """Imported when first used, for Triton is not on every platform."""
    from leap_kernels.gemv_bitmap_triton import gemv_bitmap_triton
    from leap_kernels.gemv_idx8_triton import gemv_idx8_triton
    from leap_kernels.spmm_bitmap_triton import spmm_bitmap_triton

    return {
        "gemv_bitmap_triton": gemv_bitmap_triton,
        "gemv_idx8_triton": gemv_idx8_triton,
        "spmm_bitmap_triton": spmm_bitmap_triton,
    }


def dense(weight: BMP128 | IDX8) -> Tensor:
    """The dense matrix [N, K], unpacked without waiting for a GPU."""
    if not weight.vals.is_cuda:
        return weight.unpack() if isinstance(weight, IDX8) else unpack_bitmap_cpu(weight)
    if isinstance(weight, IDX8):
        from leap_kernels.unpack_idx8_triton import unpack_idx8_triton

        return unpack_idx8_triton(weight)
    from leap_kernels.unpack_bitmap_triton import unpack_bitmap_triton

    return unpack_bitmap_triton(weight)
