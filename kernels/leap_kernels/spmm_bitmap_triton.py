"""``x @ W.T`` on GPUs for a BMP128 matrix and 2 to 32 rows of x; :mod:`leap_kernels.sparse_linear` has the contract.

A program unpacks tiles of 16 to 64 rows and 128 columns into registers, once for all rows of x, and multiplies them on
tensor cores. The columns are split among programs, whose float32 sums are added afterwards in a fixed order: without
that, a matrix of 4096 rows would occupy 256 warps, two for each SM of an H100.

``aot_table.json`` has the instructions that a weight takes. On an H200 it is slower than unpacking (docs/results.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.bmp128 import BMP128
from leap_kernels.triton_bitmap import join_columns, kept, lane_bits, lane_values, load_group
from leap_kernels.triton_launch import Launcher

MAX_BATCH = 32
_MIN_BATCH = 16  # the least that tl.dot takes
# Enough parts that each SM of the largest GPUs has work, few enough that adding them costs little: a part is written
# and read at 4 bytes for every row of W and (padded) x, so with 4096 columns at half density and 16 rows of x 8 parts
# are 22 % of the matrix's bytes, most of them in the second-level cache. A model.
_SPLITS = 8


class Config(NamedTuple):
    """How a program goes about its tile of the matrix."""

    warps: int
    block_rows: int
    """16 at least, which is the least that tl.dot takes; more rows share a tile of x."""
    splits: int = _SPLITS


@triton.jit
def spmm_bitmap_kernel(
    x_ptr,  # [count, columns]
    bits_ptr,
    off_ptr,
    row_base_ptr,  # read only if HAS_ROW_BASE
    vals_ptr,
    parts_ptr,  # float32 [splits, count, rows]
    rows,
    columns,
    groups,
    groups_per_split,
    count,
    HAS_ROW_BASE: tl.constexpr,
    WIDEN: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    split = tl.program_id(0) // blocks
    out_row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(out_row, rows - 1)[:, None]  # rows beyond the end repeat the last one and are not stored
    lane = tl.arange(0, 16)[None, :]
    vals = vals_ptr + tl.load(row_base_ptr + row) if HAS_ROW_BASE else vals_ptr
    batch = tl.arange(0, BATCH)
    x_row = x_ptr + batch[None, :] * columns
    inside = batch[None, :] < count
    sums = tl.zeros([BLOCK_ROWS, BATCH], dtype=tl.float32)
    first_group = split * groups_per_split
    for group in range(first_group, tl.minimum(first_group + groups_per_split, groups)):
        entry = row.to(tl.int64) * groups + group + tl.zeros_like(lane)
        quad, off = load_group(bits_ptr, off_ptr, entry)
        octet, rank = lane_bits(quad, off, lane, True)
        values = lane_values(vals, rank, octet)
        tile = ()
        for k in tl.static_range(8):
            tile = tile + (tl.where(kept(octet, k), values[k], 0.0),)  # type: ignore[assignment]  # noqa: RUF005
        weight = join_columns(tile)
        column = group * 128 + tl.arange(0, 128)[:, None]
        x = tl.load(x_row + column, mask=inside & (column < columns), other=0.0)
        if WIDEN:
            weight, x = weight.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(weight, x, sums, input_precision="ieee")
    part = parts_ptr + (split * count + batch[None, :]).to(tl.int64) * rows + out_row[:, None]
    tl.store(part, sums, mask=inside & (out_row[:, None] < rows))


_launch = Launcher(spmm_bitmap_kernel)


def candidates() -> list[Config]:
    """Configurations worth timing."""
    return [Config(warps, 16 * warps, splits) for warps in (1, 2, 4) for splits in (4, 8, 16)]


def spmm_bitmap_triton(x: Tensor, weight: BMP128, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """``x @ W.T + bias``, sums in float32. x: [..., K] of 1 to 32 rows, dtype and device of weight. Returns [..., N].

    bfloat16 and float16 only: tensor cores would round float32 to 10 bits.
    """
    rows, columns = weight.shape
    groups = weight.bits.shape[1]
    count = x.numel() // columns
    warps, block_rows, splits = Config(warps=2, block_rows=32) if config is None else config
    splits = max(1, min(splits, groups))
    x = x.contiguous()
    parts = torch.empty((splits, count, rows), dtype=torch.float32, device=x.device)
    _launch(
        triton.cdiv(rows, block_rows) * splits,
        (x, weight.bits, weight.off, weight.off if weight.row_base is None else weight.row_base, weight.vals, parts),
        (rows, columns, groups, triton.cdiv(groups, splits), count),
        # The interpreter, which alone runs on CPU tensors, multiplies the bit patterns of bfloat16.
        (
            weight.row_base is not None,
            x.dtype == torch.bfloat16 and not x.is_cuda,
            max(_MIN_BATCH, triton.next_power_of_2(count)),
            block_rows,
        ),
        warps,
    )
    y = parts.sum(dim=0).view(*x.shape[:-1], rows)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
