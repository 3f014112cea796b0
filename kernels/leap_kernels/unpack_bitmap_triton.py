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

_BLOCK_ROWS = 8
_BLOCK_GROUPS = 4  # 8 rows x 4 groups x 16 lanes: 4 vectors of 16 bytes for each of 128 threads to store
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
    BLOCK_GROUPS: tl.constexpr,
):
    LANES: tl.constexpr = 16  # per group
    across = tl.cdiv(groups, BLOCK_GROUPS)
    out_row = tl.program_id(0) // across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(out_row, rows - 1)[:, None]
    first_group = tl.program_id(0) % across * BLOCK_GROUPS
    position = tl.arange(0, BLOCK_GROUPS * LANES)[None, :]
    group = tl.minimum(first_group + position // LANES, groups - 1)
    vals = vals_ptr + tl.load(row_base_ptr + row) if HAS_ROW_BASE else vals_ptr
    quad, off = load_group(bits_ptr, off_ptr, row.to(tl.int64) * groups + group)
    octet, rank = lane_bits(quad, off, position % LANES, True)
    values = lane_values(vals, rank, octet)
    tile = ()
    for k in tl.static_range(8):
        tile = tile + (tl.where(kept(octet, k), values[k], 0.0),)  # type: ignore[assignment]  # noqa: RUF005
    column = first_group * 128 + tl.arange(0, BLOCK_GROUPS * 128)[None, :]
    inside = (out_row[:, None] < rows) & (column < columns)
    tl.store(dense_ptr + out_row[:, None].to(tl.int64) * columns + column, join_columns(tile), mask=inside)


_launch = Launcher(unpack_bitmap_kernel)


def unpack_bitmap_triton(weight: BMP128) -> Tensor:
    """The dense matrix [N, K]: the kept values bit for bit, +0 elsewhere."""
    rows, columns = weight.shape
    groups = weight.bits.shape[1]
    dense = torch.empty(rows, columns, dtype=weight.vals.dtype, device=weight.vals.device)
    _launch(
        triton.cdiv(rows, _BLOCK_ROWS) * triton.cdiv(groups, _BLOCK_GROUPS),
        (dense, weight.bits, weight.off, weight.off if weight.row_base is None else weight.row_base, weight.vals),
        (rows, columns, groups),
        (weight.row_base is not None, _BLOCK_ROWS, _BLOCK_GROUPS),
        _WARPS,
    )
    return dense
