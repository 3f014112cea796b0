"""``x @ W.T`` on GPUs for an IDX8-64 matrix and few rows of x; see :mod:`leap_kernels.sparse_linear` for the contract.

Values and column indices stream in vectors of 16 bytes; x is gathered from windows of 256 columns that the first-level
cache holds. One load of up to 8 bytes fetches a column of several rows of x, since the gather's conflicts over the
banks of that cache, and not its bytes, are what it costs: so several rows are interleaved first.

``aot_table.json`` has the instructions that a weight takes, README.md the ceilings that follow from them by a model.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.idx8 import BLOCK_ROWS, IDX8, PADDING_INDEX
from leap_kernels.triton_launch import Launcher

MAX_WORD = 8  # bytes of a column of x, over the rows that one pass over the matrix serves


class Config(NamedTuple):
    """How a program, which takes 4 rows of the matrix, goes about it."""

    warps: int
    """They share the row's chunks. More keep more bytes in flight, and waste more of the last pass of the loop."""
    chunks_per_warp: int = 2
    """Of each row at a time. With 2 a lane takes 16 neighbouring values: 16 bytes of indices."""
    prefetch: bool = True
    """Load the next chunks before x is gathered for these."""
    stages: int = 1
    """Of the compiler's own pipelining through shared memory; 1 for none."""


@triton.jit
def _load_chunks(base_ptr, index_ptr, vals_ptr, present):
    base = tl.load(base_ptr, mask=present, other=0).to(tl.int32) & 0xFFFF
    return base, tl.load(index_ptr, mask=present, other=0), tl.load(vals_ptr, mask=present, other=0.0)


@triton.jit
def gemv_idx8_kernel(
    x_ptr,  # [columns, passes * BATCH]
    start_ptr,
    base_ptr,
    index_ptr,
    vals_ptr,
    bias_ptr,  # read only if HAS_BIAS
    y_ptr,  # [passes * BATCH, rows]
    rows,
    columns,
    passes,
    BATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PREFETCH: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = 4
    SLOTS: tl.constexpr = 64
    # The passes over a block of rows run side by side, so that only the first one waits for memory.
    block = tl.program_id(0) // passes
    turn = tl.program_id(0) % passes
    first = tl.load(start_ptr + block)
    chunks = tl.load(start_ptr + block + 1) - first
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    chunk_row = chunk * ROWS + tl.arange(0, ROWS)[None, :, None]
    slot = chunk_row * SLOTS + tl.arange(0, SLOTS)[None, None, :]
    first_row = first.to(tl.int64) * ROWS
    bases = base_ptr + first_row + chunk_row
    indices = index_ptr + first_row * SLOTS + slot
    values = vals_ptr + first_row * SLOTS + slot
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = dtype.primitive_bitwidth
    number: tl.constexpr = tl.int16 if WIDTH == 16 else tl.int32
    word: tl.constexpr = number if BATCH * WIDTH == WIDTH else tl.int32 if BATCH * WIDTH == 32 else tl.int64
    words = x_ptr.to(tl.pointer_type(word), bitcast=True) + turn
    sums = (tl.zeros([CHUNKS, ROWS, SLOTS], dtype=tl.float32),) * BATCH
    base, index, value = _load_chunks(bases, indices, values, chunk < (chunks if PREFETCH else 0))
    for at in tl.range(0, chunks, CHUNKS, num_stages=STAGES):
        if PREFETCH:
            ahead = at + CHUNKS
            next_base, next_index, next_value = _load_chunks(
                bases + ahead * ROWS,
                indices + ahead * ROWS * SLOTS,
                values + ahead * ROWS * SLOTS,
                ahead + chunk < chunks,
            )
        else:
            base, index, value = _load_chunks(
                bases + at * ROWS, indices + at * ROWS * SLOTS, values + at * ROWS * SLOTS, at + chunk < chunks
            )
        # Only padding, whose value is 0, can point beyond the last column.
        column = tl.minimum(base + index.to(tl.int32), columns - 1)
        # Not contiguous, but aligned to one word only, so that nothing follows from the hint but the order of the axes:
        # without it Triton 3.6 deals the tile to the lanes by its first one, a trip through shared memory.
        gathered = tl.load(tl.max_contiguous(words + (column * passes).to(tl.uint32), [1, 1, 2]))
        wide = value.to(tl.float32)
        new = ()  # a tuple grows by addition: Triton does not unpack
        for b in tl.static_range(BATCH):
            x = (gathered >> (b * WIDTH)).to(number).to(dtype, bitcast=True).to(tl.float32)
            new = new + (sums[b] + wide * x,)  # type: ignore[assignment]  # noqa: RUF005
        sums = new
        if PREFETCH:
            base, index, value = next_base, next_index, next_value
    out_row = block * ROWS + tl.arange(0, ROWS)
    inside = out_row < rows
    bias = tl.load(bias_ptr + out_row, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    y_turn = y_ptr + turn.to(tl.int64) * BATCH * rows + out_row
    for b in tl.static_range(BATCH):
        y = tl.sum(tl.sum(sums[b], axis=2), axis=0) + bias
        tl.store(y_turn + b * rows, y.to(y_ptr.dtype.element_ty), mask=inside)


_launch = Launcher(gemv_idx8_kernel)


def default_config(rows: int) -> Config:
    """For a matrix of so many rows: a model, as many warps as keep 30 KB in flight on each of 132 SMs."""
    return Config(warps=8 if rows <= 2048 else 4 if rows <= 8192 else 2)


def candidates() -> list[Config]:
    """Configurations worth timing."""
    plain = [Config(warps, 2, prefetch) for warps in (1, 2, 4, 8, 16) for prefetch in (True, False)]
    deep = [Config(warps, 4, True) for warps in (1, 2, 4, 8)]
    staged = [Config(warps, 2, False, stages) for warps in (2, 4, 8) for stages in (2, 3)]
    return plain + deep + staged


def gemv_idx8_triton(x: Tensor, weight: IDX8, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """``x @ W.T + bias``, sums in float32. x: [..., K], one row at least, of weight's dtype and device.

    Returns [..., N].

    Padding multiplies an x of another column by 0: where x is not finite, a result may be NaN that otherwise would be
    infinite, as in a product with the dense matrix and its zeros.
    """
    rows, columns = weight.shape
    count = x.numel() // columns
    y_shape = (*x.shape[:-1], rows)
    if count == 1:
        batch = passes = 1
        x = x.contiguous()
        y = torch.empty(y_shape, dtype=x.dtype, device=x.device)
    else:
        batch = min(MAX_WORD // x.element_size(), triton.next_power_of_2(count))
        passes = triton.cdiv(count, batch)
        interleaved = torch.empty((columns, passes * batch), dtype=x.dtype, device=x.device)
        # What stands in its other columns enters rows of y that are not returned.
        interleaved[:, :count].copy_(x.reshape(count, columns).t())
        x = interleaved
        y = torch.empty((passes * batch, rows), dtype=x.dtype, device=x.device)
    warps, chunks_per_warp, prefetch, stages = default_config(rows) if config is None else config
    start = weight.start
    _launch(
        (start.shape[0] - 1) * passes,
        (x, start, weight.base, weight.index, weight.vals, x if bias is None else bias, y),
        (rows, columns, passes),
        (batch, bias is not None, warps * chunks_per_warp, prefetch, stages),
        warps,
    )
    return y if count == 1 else y[:count].view(y_shape)


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
