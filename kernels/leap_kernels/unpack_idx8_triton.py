"""The dense matrix of an IDX8-64 on a GPU, for prefill and large batches, where a dense product is the fastest.

:meth:`leap_kernels.idx8.IDX8.unpack` does the same through boolean indexing, which makes the CPU wait for the GPU and
needs indices of 8 bytes. This kernel moves the packed bytes once and the dense ones once and a half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.idx8 import IDX8
from leap_kernels.triton_launch import Launcher

_CHUNKS = 8
_WARPS = 4


@triton.jit
def unpack_idx8_kernel(
    dense_ptr,  # [rows, columns]
    start_ptr,
    base_ptr,
    index_ptr,
    vals_ptr,
    rows,
    columns,
    CHUNKS: tl.constexpr,
):
    ROWS: tl.constexpr = 4
    SLOTS: tl.constexpr = 64
    WIDTH: tl.constexpr = 1024
    block = tl.program_id(0)
    first = tl.load(start_ptr + block)
    chunks = tl.load(start_ptr + block + 1) - first
    block_ptr = dense_ptr + block.to(tl.int64) * ROWS * columns
    count = tl.minimum(rows - block * ROWS, ROWS) * columns  # of the block's weights, which lie in one piece
    for at in range(0, count, WIDTH):
        place = at + tl.arange(0, WIDTH)
        tl.store(block_ptr + place, tl.zeros([WIDTH], dtype=dense_ptr.dtype.element_ty), mask=place < count)
    tl.debug_barrier()  # other threads write their values into these zeros
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    row = tl.arange(0, ROWS)[None, :, None]
    slot = (chunk * ROWS + row) * SLOTS + tl.arange(0, SLOTS)[None, None, :]
    first_row = first.to(tl.int64) * ROWS
    for at in range(0, chunks, CHUNKS):
        present = at + chunk < chunks
        entry = first_row + at * ROWS
        base = tl.load(base_ptr + entry + chunk * ROWS + row, mask=present, other=0).to(tl.int32) & 0xFFFF
        index = tl.load(index_ptr + entry * SLOTS + slot, mask=present, other=255).to(tl.int32)
        value = tl.load(vals_ptr + entry * SLOTS + slot, mask=present, other=0.0)
        # Neighbouring lanes store neighbouring values, whose places share sectors; see triton_bitmap on the hint.
        place = tl.max_contiguous(block_ptr + (row * columns + base + index), [1, 1, 2])
        tl.store(place, value, mask=index != 255)


_launch = Launcher(unpack_idx8_kernel)


def unpack_idx8_triton(weight: IDX8) -> Tensor:
    """The dense matrix [N, K]: the kept values bit for bit, +0 elsewhere."""
    rows, columns = weight.shape
    dense = torch.empty(rows, columns, dtype=weight.vals.dtype, device=weight.vals.device)
    _launch(
        weight.start.numel() - 1,
        (dense, weight.start, weight.base, weight.index, weight.vals),
        (rows, columns),
        (_CHUNKS,),
        _WARPS,
    )
    return dense
