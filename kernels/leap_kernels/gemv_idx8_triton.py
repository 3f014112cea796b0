"""``x @ W.T`` on GPUs for an IDX8-64 matrix and few rows of x; see :mod:`leap_kernels.sparse_linear` for the contract.

Values and column indices stream in vectors of 16 bytes. x is gathered from shared memory, panel by panel: a lookup
there costs conflicts over 32 banks and no more, where the first-level cache takes a clock for every line of 128 bytes
that the lanes of a warp touch. A column of several rows of x is one word of up to 8 bytes, which one lookup fetches.

``aot_table.json`` has the instructions that a weight takes, README.md the ceilings that follow from them by a model.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_kernels.idx8 import BLOCK_ROWS, IDX8, PADDING_INDEX, PANEL
from leap_kernels.triton_idx8 import chunk_places
from leap_kernels.triton_launch import Launcher

MAX_WORD = 8  # bytes of a column of x, over the rows that one pass over the matrix serves


class Config(NamedTuple):
    """How a program, which takes 4 rows of the matrix, goes about it."""

    warps: int
    """They share the row's chunks in a panel. More keep more bytes in flight."""
    chunks_per_warp: int = 2
    """Of each row at a time. With 2 a lane takes 16 neighbouring values: 16 bytes of indices."""
    prefetch: bool = False
    """Load the next chunks before x is gathered for these."""


@triton.jit
def _load_chunks(base_ptr, index_ptr, vals_ptr, at, end, CHUNKS: tl.constexpr):
    """(base, index, value) of the chunks from ``at``, without those from ``end``."""
    first_base, places, first_slot, slot, present = chunk_places(at, end, CHUNKS)
    base = tl.load(base_ptr + first_base + places, mask=present, other=0).to(tl.int32) & 0xFFFF
    # Nothing is read twice, and x is to stay in the first-level cache.
    index = tl.load(index_ptr + first_slot + slot, mask=present, other=0, eviction_policy="evict_first")
    value = tl.load(vals_ptr + first_slot + slot, mask=present, other=0.0, eviction_policy="evict_first")
    return base, index, value


@triton.jit
def _load_panel(x_ptr, first_row, last_row, columns, panel, BATCH: tl.constexpr, PANEL: tl.constexpr):
    """A panel's columns of BATCH rows of x: one word each, [PANEL]; 0 beyond the last column."""
    WIDTH: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth
    number: tl.constexpr = tl.uint16 if WIDTH == 16 else tl.uint32
    word: tl.constexpr = number if BATCH == 1 else tl.uint32 if BATCH * WIDTH == 32 else tl.uint64
    column = panel * PANEL + tl.arange(0, PANEL)
    numbers = x_ptr.to(tl.pointer_type(number), bitcast=True) + column
    words = tl.zeros([PANEL], dtype=word)
    for b in tl.static_range(BATCH):
        row = tl.minimum(first_row + b, last_row).to(tl.int64)  # one that is not there enters no result
        words |= tl.load(numbers + row * columns, mask=column < columns, other=0).to(word) << (b * WIDTH)
    return words


@triton.jit
def _number(words, b: tl.constexpr, dtype: tl.constexpr):
    """Row b of the words, as float32."""
    if dtype == tl.bfloat16:
        half = (words >> (b // 2 * 32)).to(tl.uint32)
        bits = half << 16 if b % 2 == 0 else half & 0xFFFF0000
        number = bits.to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        number = (words >> (b * 16)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        number = (words >> (b * 32)).to(tl.uint32).to(tl.float32, bitcast=True)
    return number


@triton.jit
def gemv_idx8_kernel(
    x_ptr,  # [count, columns]
    start_ptr,
    base_ptr,
    index_ptr,
    vals_ptr,
    bias_ptr,  # read only if HAS_BIAS
    y_ptr,  # [count, rows]
    rows,
    columns,
    panels,
    count,
    passes,
    BATCH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PANEL: tl.constexpr,
    CHUNKS: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    ROWS: tl.constexpr = 4
    SLOTS: tl.constexpr = 64
    # The passes over a block of rows run side by side, so that only the first one waits for memory.
    block = tl.program_id(0) // passes
    x_row = tl.program_id(0) % passes * BATCH
    starts = start_ptr + block * panels
    panel = tl.full([], 0, tl.int32)
    at = tl.load(starts)
    end = tl.load(starts + 1)
    sums = (tl.zeros([CHUNKS, ROWS, SLOTS // 8], dtype=tl.float32),) * BATCH
    if PREFETCH:
        x = _load_panel(x_ptr, x_row, count - 1, columns, panel, BATCH, PANEL)
        base, index, value = _load_chunks(base_ptr, index_ptr, vals_ptr, at, end, CHUNKS)
    while panel < panels:
        if not PREFETCH:
            x = _load_panel(x_ptr, x_row, count - 1, columns, panel, BATCH, PANEL)
            base, index, value = _load_chunks(base_ptr, index_ptr, vals_ptr, at, end, CHUNKS)
        first_column = panel * PANEL
        if at + CHUNKS < end:
            at += CHUNKS
        else:
            at = end
            panel += 1
            end = tl.load(starts + panel + 1, mask=panel < panels, other=0)
        if PREFETCH:
            next_x = _load_panel(x_ptr, x_row, count - 1, columns, panel, BATCH, PANEL)
            next_base, next_index, next_value = _load_chunks(base_ptr, index_ptr, vals_ptr, at, end, CHUNKS)
        # Only padding, whose value is 0, can point beyond the panel.
        column = (base - first_column + index.to(tl.int32)) & (PANEL - 1)
        gathered = tl.reshape(tl.gather(x, tl.reshape(column, [CHUNKS * ROWS * SLOTS]), 0), [CHUNKS, ROWS, SLOTS])
        wide = value.to(tl.float32)
        new = ()  # a tuple grows by addition: Triton does not unpack
        for b in tl.static_range(BATCH):
            product = tl.reshape(wide * _number(gathered, b, x_ptr.dtype.element_ty), [CHUNKS, ROWS, SLOTS // 8, 8])
            new = new + (sums[b] + tl.sum(product, axis=3),)  # type: ignore[assignment]  # noqa: RUF005
        sums = new
        if PREFETCH:
            x, base, index, value = next_x, next_base, next_index, next_value
    out_row = block * ROWS + tl.arange(0, ROWS)
    inside = out_row < rows
    bias = tl.load(bias_ptr + out_row, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    for b in tl.static_range(BATCH):
        y = tl.sum(tl.sum(sums[b], axis=2), axis=0) + bias
        y_row = y_ptr + (x_row + b).to(tl.int64) * rows + out_row
        tl.store(y_row, y.to(y_ptr.dtype.element_ty), mask=out_row < tl.where(x_row + b < count, rows, 0))


_launch = Launcher(gemv_idx8_kernel)


def default_config(rows: int, columns: int, batch: int = 1) -> Config:
    """For a matrix [rows, columns], and so many rows of x in a pass.

    For one row the fastest of :func:`candidates` on an H200 at 60 % (docs/results.md); for several a guess: more warps
    share the words that several rows of x make.
    """
    if batch > 1:
        return Config(16)
    if columns > 8192:
        return Config(8)
    return Config(8, 4) if rows <= 2048 else Config(4, 4)


def candidates() -> list[Config]:
    """Configurations worth timing, the most likely ones first."""
    first = [Config(8), Config(16), Config(8, 4), Config(4, 4), Config(4), Config(8, 2, True)]
    return [*first, Config(4, 8), Config(8, 1), Config(16, 1), Config(4, 2, True), Config(16, 4), Config(4, 4, True)]


def gemv_idx8_triton(x: Tensor, weight: IDX8, bias: Tensor | None = None, config: Config | None = None) -> Tensor:
    """``x @ W.T + bias``, sums in float32. x: [..., K], one row at least, of weight's dtype and device.

    Returns [..., N].

    Padding multiplies an x of another column by 0: where x is not finite, a result may be NaN that otherwise would be
    infinite, as in a product with the dense matrix and its zeros.
    """
    rows, columns = weight.shape
    count = x.numel() // columns
    x = x.contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    batch = 1 if count == 1 else min(MAX_WORD // x.element_size(), triton.next_power_of_2(count))
    passes = -(-count // batch)
    warps, chunks_per_warp, prefetch = default_config(rows, columns, batch) if config is None else config
    _launch(
        -(-rows // BLOCK_ROWS) * passes,
        (x, weight.start, weight.base, weight.index, weight.vals, x if bias is None else bias, y),
        (rows, columns, weight.panels, count, passes),
        (batch, bias is not None, PANEL, warps * chunks_per_warp, prefetch),
        warps,
    )
    return y


def gemv_idx8_reference(x: Tensor, weight: IDX8) -> Tensor:
    """``x @ W.T`` in float64 from the format's own arrays: what the kernel is tested against."""
    chunk_rows = weight.base.to(torch.int64)[..., None] + weight.index
    held = weight.index != PADDING_INDEX
    gathered = x.double()[:, torch.where(held, chunk_rows, 0)]
    products = torch.where(held, weight.vals.double() * gathered, 0.0).sum(dim=-1)  # [batch, chunks, 4]
    length = torch.diff(weight.start).view(-1, weight.panels).sum(dim=1)
    block = torch.repeat_interleave(torch.arange(length.numel(), device=length.device), length)
    y = products.new_zeros(x.shape[0], length.numel(), BLOCK_ROWS).index_add(1, block, products)
    return y.flatten(1)[:, : weight.shape[0]]
