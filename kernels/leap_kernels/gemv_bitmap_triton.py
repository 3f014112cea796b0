"""``x @ W.T`` on GPUs for a BMP128 matrix and few rows of x; see :mod:`leap_kernels.sparse_linear` for the contract.

Speed has not been measured on a GPU. Compiled for sm_90, the loop takes 14.6 instructions per weight (counted in the
machine code, bfloat16), which puts its ceiling at about 1.7 times dense on cards with GDDR memory and 1.2 to 1.35
times on A100 and H100, at half the weights kept (a model: 128 instructions per clock and SM against bandwidth).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.bmp128 import BMP128, GROUP
from leap_kernels.triton_bitmap import kept, lane_bits, lane_values, split_columns

# One warp for 4 rows, which share its loads of x: fewest instructions per weight of the shapes tried (14.6; four warps
# for 4 rows and 8 groups 15.0, one warp for one row 16.8).
_BLOCK_ROWS = 4
_BLOCK_GROUPS = 2
_WARPS = 1


@triton.jit
def gemv_bitmap_kernel(
    bits_ptr,  # int32 [rows, groups, 4], the bits of the uint32 words
    off_ptr,
    row_base_ptr,  # read only if HAS_ROW_BASE
    vals_ptr,
    x_ptr,  # float32 [batch, x_columns], zero beyond the matrix's columns
    y_ptr,  # [batch, rows]
    rows,
    groups,
    x_columns,  # groups * 128, rounded up to whole blocks of groups
    HAS_ROW_BASE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
):
    LANES: tl.constexpr = 16  # per group
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Rows and groups beyond the end read the last one's data, which needs no masks, and are dropped afterwards.
    row = tl.minimum(out_row, rows - 1)[:, None]
    position = tl.arange(0, BLOCK_GROUPS * LANES)[None, :]
    vals = vals_ptr + tl.load(row_base_ptr + row) if HAS_ROW_BASE else vals_ptr
    x_row = x_ptr + tl.program_id(1) * x_columns + tl.arange(0, BLOCK_GROUPS * 128)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_GROUPS * LANES], dtype=tl.float32)
    for first_group in range(0, groups, BLOCK_GROUPS):
        group = first_group + position // LANES
        entry = row.to(tl.int64) * groups + tl.minimum(group, groups - 1)
        octet, rank = lane_bits(bits_ptr, off_ptr, entry, position % LANES, group < groups)
        columns = split_columns(tl.load(x_row + first_group * 128))
        values = lane_values(vals + rank, octet)
        for k in tl.static_range(8):
            product = values[k].to(tl.float32) * columns[k][None, :]
            sums = tl.where(kept(octet, k), sums + product, sums)
    y = tl.sum(sums, axis=1).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + tl.program_id(1) * rows + out_row, y, mask=out_row < rows)


def gemv_bitmap_triton(x: Tensor, weight: BMP128) -> Tensor:
    """``x @ W.T``, sums in float32. x: [rows, K] of weight's dtype and device. Returns [rows, N]."""
    rows, columns = weight.shape
    groups = weight.bits.shape[1]
    x_columns = triton.cdiv(groups, _BLOCK_GROUPS) * _BLOCK_GROUPS * GROUP
    padded = torch.nn.functional.pad(x.float(), (0, x_columns - columns)).contiguous()
    y = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    gemv_bitmap_kernel[(triton.cdiv(rows, _BLOCK_ROWS), x.shape[0])](
        weight.bits.view(torch.int32),
        weight.off,
        weight.off if weight.row_base is None else weight.row_base,
        weight.vals,
        padded,
        y,
        rows,
        groups,
        x_columns,
        HAS_ROW_BASE=weight.row_base is not None,
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_GROUPS=_BLOCK_GROUPS,
        num_warps=_WARPS,
    )
    return y
