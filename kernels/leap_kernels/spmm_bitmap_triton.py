"""``x @ W.T`` on GPUs for a BMP128 matrix and 2 to 32 rows of x; :mod:`leap_kernels.sparse_linear` has the contract.

A program unpacks tiles of 16 to 64 rows and 128 columns into registers, once for all rows of x, and multiplies them on
tensor cores. The columns are split among programs, whose float32 sums are added afterwards in a fixed order: without
that, a matrix of 4096 rows would occupy 256 warps, two for each SM of an H100.

Speed has not been measured on a GPU: ``aot_table.json`` has the instructions that a weight takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.bmp128 import BMP128, GROUP
from leap_kernels.triton_bitmap import join_columns, kept, lane_bits, lane_values
from leap_kernels.triton_launch import configurations

MAX_BATCH = 32
_MIN_BATCH = 16  # the least that tl.dot takes
# Enough parts that each SM of the largest GPUs has work, few enough that adding them costs little: a part is written
# and read at 4 bytes for every row of W and (padded) x, so with 4096 columns at half density and 16 rows of x 8 parts
# are 22 % of the matrix's bytes, most of them in the second-level cache. A model.
_SPLITS = 8

# Rows per tile and warps: more rows share a tile of x, more warps a row tile; 16 is the least that tl.dot takes.
CONFIGS = configurations([({"BLOCK_ROWS": 16}, 1), ({"BLOCK_ROWS": 32}, 2), ({"BLOCK_ROWS": 64}, 4)])


@triton.autotune(CONFIGS, key=["rows", "groups", "BATCH"])
@triton.jit
def spmm_bitmap_kernel(
    bits_ptr,  # int32 [rows, groups, 4], the bits of the uint32 words
    off_ptr,
    row_base_ptr,  # read only if HAS_ROW_BASE
    vals_ptr,
    x_ptr,  # [BATCH, groups * 128], in the dtype of vals, zero beyond the matrix's columns
    parts_ptr,  # float32 [splits, BATCH, rows]
    rows,
    groups,
    groups_per_split,
    HAS_ROW_BASE: tl.constexpr,
    WIDEN: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    out_row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(out_row, rows - 1)[:, None]  # rows beyond the end repeat the last one and are not stored
    lane = tl.arange(0, 16)[None, :]
    vals = vals_ptr + tl.load(row_base_ptr + row) if HAS_ROW_BASE else vals_ptr
    batch = tl.arange(0, BATCH)
    x_tile = x_ptr + batch[None, :] * groups * 128 + tl.arange(0, 128)[:, None]
    sums = tl.zeros([BLOCK_ROWS, BATCH], dtype=tl.float32)
    first_group = tl.program_id(1) * groups_per_split
    for group in range(first_group, tl.minimum(first_group + groups_per_split, groups)):
        entry = row.to(tl.int64) * groups + group + tl.zeros_like(lane)
        octet, rank = lane_bits(bits_ptr, off_ptr, entry, lane, True)
        values = lane_values(vals + rank, octet)
        columns = ()
        for k in tl.static_range(8):
            columns = columns + (tl.where(kept(octet, k), values[k], 0.0),)  # type: ignore[assignment]  # noqa: RUF005
        weight = join_columns(columns)
        x = tl.load(x_tile + group * 128)
        if WIDEN:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    part = parts_ptr + tl.program_id(1) * BATCH * rows + batch[None, :] * rows + out_row[:, None]
    tl.store(part, sums, mask=out_row[:, None] < rows)


def spmm_bitmap_triton(x: Tensor, weight: BMP128) -> Tensor:
    """``x @ W.T``, sums in float32. x: [1 .. 32, K], dtype and device of weight. Returns [rows, N].

    bfloat16 and float16 only: tensor cores would round float32 to 10 bits.
    """
    rows, columns = weight.shape
    groups = weight.bits.shape[1]
    batch = max(_MIN_BATCH, triton.next_power_of_2(x.shape[0]))
    padded = torch.nn.functional.pad(x, (0, groups * GROUP - columns, 0, batch - x.shape[0])).contiguous()
    splits = max(1, min(_SPLITS, groups))
    parts = torch.empty(splits, batch, rows, dtype=torch.float32, device=x.device)
    spmm_bitmap_kernel[lambda constants: (triton.cdiv(rows, constants["BLOCK_ROWS"]), splits)](
        weight.bits.view(torch.int32),
        weight.off,
        weight.off if weight.row_base is None else weight.row_base,
        weight.vals,
        padded,
        parts,
        rows,
        groups,
        triton.cdiv(groups, splits),
        HAS_ROW_BASE=weight.row_base is not None,
        # The interpreter, which alone runs on CPU tensors, multiplies the bit patterns of bfloat16.
        WIDEN=x.dtype == torch.bfloat16 and not x.is_cuda,
        BATCH=batch,
    )
    return parts[:, : x.shape[0]].sum(dim=0).to(x.dtype)
