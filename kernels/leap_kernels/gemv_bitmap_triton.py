"""``x @ W.T`` on GPUs for a BMP128 matrix and few rows of x; see :mod:`leap_kernels.sparse_linear` for the contract.

``aot_table.json`` has the instructions that a weight takes, README.md the ceilings that follow from them by a model.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.bmp128 import BMP128
from leap_kernels.triton_bitmap import kept, lane_bits, lane_values, load_group, split_columns
from leap_kernels.triton_launch import Launcher


class Config(NamedTuple):
    """How a program goes about its rows of the matrix."""

    warps: int
    """They share the row's groups of columns. More keep more bytes in flight."""
    block_rows: int = 4
    """Of the matrix. They share the loads of x."""
    groups_per_warp: int = 2
    """At a time: 16 lanes for each."""
    prefetch: bool = True
    """Load the words of the next groups before the values of these."""


@triton.jit
def gemv_bitmap_kernel(
    x_ptr,  # [batch, columns]
    bits_ptr,
    off_ptr,
    row_base_ptr,  # read only if HAS_ROW_BASE
    vals_ptr,
    bias_ptr,  # read only if HAS_BIAS
    y_ptr,  # [batch, rows]
    rows,
    columns,
    groups,
    batch,
    HAS_ROW_BASE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    LANES: tl.constexpr = 16  # per group
    # The rows of x of a block of rows of W run side by side, so that only the first one waits for memory.
    turn = tl.program_id(0) % batch
    out_row = tl.program_id(0) // batch * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Rows and groups beyond the end read the last one's data, which needs no masks, and are dropped afterwards.
    row = tl.minimum(out_row, rows - 1)[:, None]
    position = tl.arange(0, BLOCK_GROUPS * LANES)[None, :]
    vals = vals_ptr + tl.load(row_base_ptr + row) if HAS_ROW_BASE else vals_ptr
    x_row = x_ptr + turn.to(tl.int64) * columns
    column = tl.arange(0, BLOCK_GROUPS * 128)
    first_entry = row.to(tl.int64) * groups
    sums = tl.zeros([BLOCK_ROWS, BLOCK_GROUPS * LANES], dtype=tl.float32)
    if PREFETCH:
        quad, off = load_group(bits_ptr, off_ptr, first_entry + tl.minimum(position // LANES, groups - 1))
    for first_group in range(0, groups, BLOCK_GROUPS):
        group = first_group + position // LANES
        if PREFETCH:
            following = tl.minimum(group + BLOCK_GROUPS, groups - 1)
            next_quad, next_off = load_group(bits_ptr, off_ptr, first_entry + following)
        else:
            quad, off = load_group(bits_ptr, off_ptr, first_entry + tl.minimum(group, groups - 1))
        octet, rank = lane_bits(quad, off, position % LANES, group < groups)
        at = first_group * 128 + column
        parts = split_columns(tl.load(x_row + at, mask=at < columns, other=0.0))
        values = lane_values(vals, rank, octet)
        for k in tl.static_range(8):
            product = values[k].to(tl.float32) * parts[k].to(tl.float32)[None, :]
            sums = tl.where(kept(octet, k), sums + product, sums)
        if PREFETCH:
            quad, off = next_quad, next_off
    y = tl.sum(sums, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + out_row, mask=out_row < rows, other=0.0).to(tl.float32)
    tl.store(y_ptr + turn.to(tl.int64) * rows + out_row, y.to(y_ptr.dtype.element_ty), mask=out_row < rows)


_launch = Launcher(gemv_bitmap_kernel)


def default_config(rows: int) -> Config:
    """For a matrix of so many rows: the fastest of :func:`candidates` on an H200 at 60 % or within 5 % of it."""
    return Config(warps=8 if rows <= 2048 else 4)


def candidates() -> list[Config]:
    """Configurations worth timing."""
    warps = (1, 2, 4, 8)
    return [
        *(Config(count, 4, 2, prefetch) for count in warps for prefetch in (True, False)),
        *(Config(count, 2, 2, True) for count in warps),
        *(Config(count, 8, 2, True) for count in warps[:3]),
    ]


def gemv_bitmap_triton(x: Tensor, weight: BMP128, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """``x @ W.T + bias``, sums in float32. x: [..., K] of weight's dtype and device. Returns [..., N]."""
    rows, columns = weight.shape
    batch = x.numel() // columns
    off = weight.off
    row_base = weight.row_base
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    warps, block_rows, groups_per_warp, prefetch = default_config(rows) if config is None else config
    _launch(
        -(-rows // block_rows) * batch,
        (
            x,
            weight.bits,
            off,
            off if row_base is None else row_base,
            weight.vals,
            x if bias is None else bias,
            y,
        ),
        (rows, columns, off.shape[1], batch),
        (row_base is not None, bias is not None, block_rows, warps * groups_per_warp, prefetch),
        warps,
    )
    return y
