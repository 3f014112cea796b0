"""The dense matrix of a BMP128 on a GPU, for prefill and large batches, where a dense product is the fastest there is.

:meth:`leap_kernels.BMP128.unpack` does the same through boolean indexing, which makes the CPU wait for the GPU and
needs indices of 8 bytes. This kernel moves the packed bytes and the dense ones, once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.bmp128 import BMP128
from leap_kernels.triton_bitmap import join_columns, kept, lane_bits, lane_values, load_group
from leap_kernels.triton_launch import Launcher

_BLOCK_ROWS = 8  # 8 rows x 16 lanes: one group of columns for 4 warps, a vector of 16 bytes to store for each lane
_WARPS = 4


@triton.jit
def unpack_bitmap_kernel(
    dense_ptr,  # [rows, columns]
    bits_ptr,
    off_ptr,
    row_base_ptr,  # read only if HAS_ROW_BASE
    vals_ptr,
    rows,
    columns,
    groups,
    HAS_ROW_BASE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    out_row = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(out_row, rows - 1)[:, None]
    group = tl.program_id(0) % groups
    lane = tl.arange(0, 16)[None, :]
    vals = vals_ptr + tl.load(row_base_ptr + row) if HAS_ROW_BASE else vals_ptr
    quad, off = load_group(bits_ptr, off_ptr, row * groups + group + tl.zeros_like(lane))
    octet, rank = lane_bits(quad, off, lane, True)
    values = lane_values(vals, rank, octet)
    tile = ()
    for k in tl.static_range(8):
        tile = tile + (tl.where(kept(octet, k), values[k], 0.0),)  # type: ignore[assignment]  # noqa: RUF005
    column = group * 128 + tl.arange(0, 128)[None, :]
    inside = (out_row[:, None] < rows) & (column < columns)
    tl.store(dense_ptr + out_row[:, None] * columns + column, join_columns(tile), mask=inside)


_launch = Launcher(unpack_bitmap_kernel)


def unpack_bitmap_triton(weight: BMP128) -> Tensor:
    """The dense matrix [N, K]: the kept values bit for bit, +0 elsewhere."""
    rows, columns = weight.shape
    groups = weight.bits.shape[1]
    dense = torch.empty(rows, columns, dtype=weight.vals.dtype, device=weight.vals.device)
    _launch(
        triton.cdiv(rows, _BLOCK_ROWS) * groups,
        (dense, weight.bits, weight.off, weight.off if weight.row_base is None else weight.row_base, weight.vals),
        (rows, columns, groups),
        (weight.row_base is not None, _BLOCK_ROWS),
        _WARPS,
    )
    return dense
