"""The dense matrix of an IDX8-64 on a GPU, for prefill and large batches, where a dense product is the fastest.

:meth:`leap_kernels.idx8.IDX8.unpack` does the same through boolean indexing, which makes the CPU wait for the GPU and
needs indices of 8 bytes. A program of this kernel takes a panel of 4 rows: it loads their values, stores zeros
everywhere meanwhile, and stores the values into these while the second-level cache still holds them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.idx8 import IDX8, PANEL
from leap_kernels.triton_idx8 import chunk_places
from leap_kernels.triton_launch import Launcher

_CHUNKS = 16  # of a row at a time
_WARPS = 8


@triton.jit
def _load_chunks(base_ptr, index_ptr, vals_ptr, at, end, CHUNKS: tl.constexpr):
    """(column, index, value) of the chunks from ``at``; index is 255 for padding and from chunk ``end`` on."""
    first_base, places, first_slot, slot, present = chunk_places(at, end, CHUNKS)
    base = tl.load(base_ptr + first_base + places, mask=present, other=0).to(tl.int32) & 0xFFFF
    index = tl.load(index_ptr + first_slot + slot, mask=present, other=255).to(tl.int32)
    value = tl.load(vals_ptr + first_slot + slot, mask=present, other=0.0)
    return base + index, index, value


@triton.jit
def _store_chunks(block_ptr, columns, column, index, value):
    row = tl.arange(0, 4)[None, :, None]
    # Neighbouring lanes store neighbouring values, whose places share sectors; see triton_bitmap on the hint.
    place = tl.max_contiguous(block_ptr + (row * columns + column), [1, 1, 2])
    tl.store(place, value, mask=index != 255)


@triton.jit
def unpack_idx8_kernel(
    dense_ptr,  # [rows, columns]
    start_ptr,
    base_ptr,
    index_ptr,
    vals_ptr,
    rows,
    columns,
    panels,
    PANEL: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    ROWS: tl.constexpr = 4
    part = tl.program_id(0)
    block = part // panels
    at = tl.load(start_ptr + part)
    end = tl.load(start_ptr + part + 1)
    block_ptr = dense_ptr + block.to(tl.int64) * ROWS * columns
    column, index, value = _load_chunks(base_ptr, index_ptr, vals_ptr, at, end, CHUNKS)
    row = tl.arange(0, ROWS)[:, None]
    of_panel = part % panels * PANEL + tl.arange(0, PANEL)[None, :]
    inside = (block * ROWS + row < rows) & (of_panel < columns)
    zeros = tl.zeros([ROWS, PANEL], dtype=dense_ptr.dtype.element_ty)
    tl.store(block_ptr + (row * columns + of_panel), zeros, mask=inside)
    tl.debug_barrier()  # other threads write their values into these zeros
    _store_chunks(block_ptr, columns, column, index, value)
    at += CHUNKS
    while at < end:
        column, index, value = _load_chunks(base_ptr, index_ptr, vals_ptr, at, end, CHUNKS)
        _store_chunks(block_ptr, columns, column, index, value)
        at += CHUNKS


_launch = Launcher(unpack_idx8_kernel)


def unpack_idx8_triton(weight: IDX8) -> Tensor:
    """The dense matrix [N, K]: the kept values bit for bit, +0 elsewhere."""
    rows, columns = weight.shape
    dense = torch.empty(rows, columns, dtype=weight.vals.dtype, device=weight.vals.device)
    _launch(
        weight.start.numel() - 1,
        (dense, weight.start, weight.base, weight.index, weight.vals),
        (rows, columns, weight.panels),
        (PANEL, _CHUNKS),
        _WARPS,
    )
    return dense
