"""``x @ W.T`` on GPUs for a BMP128 matrix and few rows of x; see :mod:`leap_kernels.sparse_linear` for the contract.

A lane takes 8 neighbouring columns of a group: it finds the rank of the first among the group's values by counting the
mask bits below it, and those of the others by adding bits.

Speed has not been measured on a GPU. Compiled for sm_90, the loop takes 14.6 instructions per weight (counted in the
machine code, bfloat16), which puts its ceiling at about 1.7 times dense on cards with GDDR memory and 1.2 to 1.35
times on A100 and H100, at half the weights kept (a model: 128 instructions per clock and SM against bandwidth).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.bmp128 import BMP128, GROUP

# One warp for 4 rows, which share its loads of x: fewest instructions per weight of the shapes tried (14.6; four warps
# for 4 rows and 8 groups 15.0, one warp for one row 16.8).
_BLOCK_ROWS = 4
_BLOCK_GROUPS = 2
_WARPS = 1


@triton.jit
def popcount(v):
    """Bits set in each uint32, as int32. The compiler recognises the pattern: one POPC."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return ((v * 0x01010101) >> 24).to(tl.int32)


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
    COLUMNS: tl.constexpr = 8  # per lane
    LANES: tl.constexpr = 128 // COLUMNS  # per group
    WORD_LANES: tl.constexpr = 32 // COLUMNS
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Rows and groups beyond the end read the last one's data, which needs no masks, and are dropped afterwards.
    row = tl.minimum(out_row, rows - 1)[:, None]
    position = tl.arange(0, BLOCK_GROUPS * LANES)[None, :]
    lane = position % LANES
    word_index = lane // WORD_LANES
    shift = ((lane % WORD_LANES) * COLUMNS).to(tl.uint32)
    below = (tl.full([1, 1], 1, tl.uint32) << shift) - 1
    vals = vals_ptr + tl.load(row_base_ptr + row) if HAS_ROW_BASE else vals_ptr
    x_row = x_ptr + tl.program_id(1) * x_columns + tl.arange(0, BLOCK_GROUPS * 128)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_GROUPS * LANES], dtype=tl.float32)
    for first_group in range(0, groups, BLOCK_GROUPS):
        group = first_group + position // LANES
        entry = row.to(tl.int64) * groups + tl.minimum(group, groups - 1)
        words = bits_ptr + entry * 4
        word = tl.load(words + word_index).to(tl.uint32, bitcast=True)
        if BLOCK_GROUPS > 1:
            word = tl.where(group < groups, word, 0)
        rank = popcount(word & below) + tl.load(off_ptr + entry)
        for earlier in tl.static_range(3):
            other = popcount(tl.load(words + earlier).to(tl.uint32, bitcast=True))
            rank += tl.where(earlier < word_index, other, 0)
        # The lane's neighbouring columns of x, one tensor for each: 4 h + 2 i + j for (h, i, j) in the reshaped tile.
        x = tl.reshape(tl.load(x_row + first_group * 128), [BLOCK_GROUPS * LANES, 2, 2, 2])
        even, odd = tl.split(x)
        even_low, even_high = tl.split(even)
        odd_low, odd_high = tl.split(odd)
        x0, x4 = tl.split(even_low)
        x2, x6 = tl.split(even_high)
        x1, x5 = tl.split(odd_low)
        x3, x7 = tl.split(odd_high)
        columns = (x0, x1, x2, x3, x4, x5, x6, x7)
        for k in tl.static_range(COLUMNS):
            kept = (word >> (shift + k)) & 1
            value = tl.load(vals + rank, mask=kept != 0, other=0.0).to(tl.float32)
            sums += value * columns[k][None, :]
            rank += kept.to(tl.int32)
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
