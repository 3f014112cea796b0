"""``x @ W.T`` on GPUs for an IDX8-64 matrix and few rows of x; see :mod:`leap_kernels.sparse_linear` for the contract.

Values and column indices stream in vectors of 16 bytes; x is gathered, four bytes for each value and row of x, from
windows of 256 columns that the first-level cache holds.

Speed has not been measured on a GPU: ``aot_table.json`` has the instructions that a weight takes, README.md the
ceilings that follow from them by a model.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.idx8 import BLOCK_ROWS, IDX8, PADDING_INDEX
from leap_kernels.triton_launch import configurations

# Rows of x that one pass over the matrix serves: each takes an accumulator for every one of a lane's 16 values.
MAX_BATCH = 4

# A lane takes 16 neighbouring values: 16 bytes of indices. So a warp takes 2 chunks of 4 rows at a time, and more warps
# share the chunks of a block. More of them keep more bytes in flight where the matrix has few rows, but waste more of
# their last pass: with 4096 columns at half density, 33 chunks, 3 % with one warp, 21 % with four.
CONFIGS = configurations([({"CHUNKS": 2 * warps}, warps) for warps in (1, 2, 4)])


@triton.autotune(CONFIGS, key=["rows", "x_stride", "BATCH"])
@triton.jit
def gemv_idx8_kernel(
    start_ptr,
    base_ptr,  # int16, the bits of the uint16 words
    index_ptr,
    vals_ptr,
    x_ptr,  # float32 [batches, x_stride / BATCH, BATCH], zero beyond the matrix's columns
    y_ptr,  # [batches, BATCH, rows]
    rows,
    x_stride,
    BATCH: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    ROWS: tl.constexpr = 4
    SLOTS: tl.constexpr = 64
    block = tl.program_id(0)
    first = tl.load(start_ptr + block)
    chunks = tl.load(start_ptr + block + 1) - first
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    chunk_row = chunk * ROWS + tl.arange(0, ROWS)[None, :, None]
    slot = chunk_row * SLOTS + tl.arange(0, SLOTS)[None, None, :]
    first_row = first.to(tl.int64) * ROWS
    bases = base_ptr + first_row + chunk_row
    indices = index_ptr + first_row * SLOTS + slot
    values = vals_ptr + first_row * SLOTS + slot
    x_batch = x_ptr + tl.program_id(1).to(tl.int64) * x_stride
    sums = (tl.zeros([CHUNKS, ROWS, SLOTS], dtype=tl.float32),) * BATCH
    for at in range(0, chunks, CHUNKS):
        present = at + chunk < chunks
        base = tl.load(bases + at * ROWS, mask=present, other=0).to(tl.uint16, bitcast=True)
        index = tl.load(indices + at * ROWS * SLOTS, mask=present, other=0)
        value = tl.load(values + at * ROWS * SLOTS, mask=present, other=0.0).to(tl.float32)
        column = x_batch + base.to(tl.int32) * BATCH + index.to(tl.int32) * BATCH
        new = ()  # a tuple grows by addition: Triton does not unpack
        for b in tl.static_range(BATCH):
            new = new + (sums[b] + value * tl.load(column + b),)  # type: ignore[assignment]  # noqa: RUF005
        sums = new
    out_row = block * ROWS + tl.arange(0, ROWS)
    y_batch = y_ptr + tl.program_id(1).to(tl.int64) * BATCH * rows + out_row
    for b in tl.static_range(BATCH):
        y = tl.sum(tl.sum(sums[b], axis=2), axis=0)
        tl.store(y_batch + b * rows, y.to(y_ptr.dtype.element_ty), mask=out_row < rows)


def gemv_idx8_triton(x: Tensor, weight: IDX8) -> Tensor:
    """``x @ W.T``, sums in float32. x: [rows >= 1, K] of weight's dtype and device. Returns [rows, N].

    Padding multiplies an x of another column by 0: where x is not finite, a result may be NaN that otherwise would be
    infinite, as in a product with the dense matrix and its zeros.
    """
    rows, columns = weight.shape
    batch = min(MAX_BATCH, triton.next_power_of_2(x.shape[0]))
    batches = triton.cdiv(x.shape[0], batch)
    padded = torch.nn.functional.pad(x.float(), (0, 256, 0, batches * batch - x.shape[0]))
    interleaved = padded.view(batches, batch, columns + 256).transpose(1, 2).contiguous()
    y = torch.empty(batches * batch, rows, dtype=x.dtype, device=x.device)
    gemv_idx8_kernel[(weight.start.numel() - 1, batches)](
        weight.start,
        weight.base.view(torch.int16),
        weight.index,
        weight.vals,
        interleaved,
        y,
        rows,
        interleaved.stride(0),
        BATCH=batch,
    )
    return y[: x.shape[0]]


def gemv_idx8_reference(x: Tensor, weight: IDX8) -> Tensor:
    """``x @ W.T`` in float64 from the format's own arrays: what the kernel is tested against."""
    chunk_rows = weight.base.to(torch.int64)[..., None] + weight.index
    held = weight.index != PADDING_INDEX
    gathered = x.double()[:, torch.where(held, chunk_rows, 0)]
    products = torch.where(held, weight.vals.double() * gathered, 0.0).sum(dim=-1)  # [batch, chunks, 4]
    length = torch.diff(weight.start).to(torch.int64)
    block = torch.repeat_interleave(torch.arange(length.numel(), device=length.device), length)
    y = products.new_zeros(x.shape[0], length.numel(), BLOCK_ROWS).index_add(1, block, products)
    return y.flatten(1)[:, : weight.shape[0]]
