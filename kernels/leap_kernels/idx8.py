"""IDX8-64: a sparse matrix format with one byte of column index per value, derived from BMP128 when a model is loaded.

It reads more bytes than BMP128 (1.52 to 1.57 per weight at half density and 2-byte values, against 1.16) and takes a
quarter of its instructions, which is what counts where memory outruns the instructions of a GPU: see
:mod:`leap_kernels.dispatch`.

A row's kept values are cut into chunks of up to 64, from the left. A chunk ends early where its next value would lie
255 columns or more to the right of its first; 4 neighbouring rows get the same number of chunks. With B = ceil(N / 4)
blocks of rows and C chunks for every row of a block, counted over the blocks, the chunks lie in the order [C, 4 rows]:

    start     int32  [B + 1]       block b has the chunks [start[b], start[b + 1]) of each of its 4 rows
    base      uint16 [C, 4]        column of the chunk's first value; 0 for a chunk without values
    index     uint8  [C, 4, 64]    column minus base; 255 = padding
    vals      [C, 4, 64]           kept values; +0 for padding

``kernels/README.md`` is the specification. It lives in memory only: files hold BMP128.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from leap_kernels.bmp128 import BMP128, pack

CHUNK = 64
BLOCK_ROWS = 4
PADDING_INDEX = 255
MAX_COLUMNS = 2**16  # what a base of 16 bits addresses


@dataclass(frozen=True, slots=True)
class IDX8:
    """A matrix [N, K] in the format above. Build it with :func:`from_bmp128`."""

    shape: tuple[int, int]
    start: Tensor
    base: Tensor
    index: Tensor
    vals: Tensor

    @property
    def nnz(self) -> int:
        return int((self.index != PADDING_INDEX).sum())

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _flat_positions(self) -> tuple[Tensor, Tensor]:
        """(which slots hold a value: bool [C, 4, 64]; their places in the row-major matrix: int64 [nnz])."""
        chunks = self.base.shape[0]
        device = self.base.device
        block = torch.searchsorted(self.start[1:].contiguous(), torch.arange(chunks, device=device), right=True)
        row = block[:, None] * BLOCK_ROWS + torch.arange(BLOCK_ROWS, device=device)
        first = row * self.shape[1] + self.base.to(torch.int64)
        held = self.index != PADDING_INDEX
        return held, (first[..., None] + self.index)[held]

    def mask(self) -> Tensor:
        """Which weights are kept: bool [N, K]."""
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.vals.device)
        mask.view(-1)[self._flat_positions()[1]] = True
        return mask

    def unpack(self) -> Tensor:
        """The dense matrix [N, K]: the kept values bit for bit, +0 elsewhere."""
        dense = torch.zeros(self.shape, dtype=self.vals.dtype, device=self.vals.device)
        held, places = self._flat_positions()
        dense.view(-1)[places] = self.vals[held]
        return dense

    def to(self, device: torch.device | str) -> "IDX8":
        return IDX8(self.shape, *(tensor.to(device) for tensor in self.tensors().values()))

    def with_vals(self, vals: Tensor) -> "IDX8":
        """The same pattern with other values, of any dtype that the format takes."""
        return IDX8(self.shape, self.start, self.base, self.index, vals)

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name, in the order of the fields."""
        return {"start": self.start, "base": self.base, "index": self.index, "vals": self.vals}

    def to_bmp128(self) -> BMP128:
        """The same matrix as :func:`from_bmp128` was given it."""
        return pack(self.unpack(), self.mask())


def _chunk_bounds(places: Tensor, row_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Where chunks start among the kept values, and their row.

    places: int64 [nnz], sorted places of the kept values in the row-major matrix; row_ends: int64 [N], how many of them
    lie in the rows up to and including this one. Returns two int64 [chunks], sorted by start.

    The loop takes one chunk of every row at a time, so it runs as often as the fullest row has chunks.
    """
    position = torch.cat([row_ends.new_zeros(1), row_ends])[:-1]
    row = torch.arange(row_ends.numel(), device=places.device)
    starts, rows = [position[:0]], [row[:0]]
    while True:
        open_ = position < row_ends[row]
        position, row = position[open_], row[open_]
        if position.numel() == 0:
            break
        starts.append(position)
        rows.append(row)
        reach = torch.searchsorted(places, places[position] + PADDING_INDEX)
        position = torch.minimum(position + CHUNK, torch.minimum(reach, row_ends[row]))
    start, order = torch.cat(starts).sort()
    return start, torch.cat(rows)[order]


def from_bmp128(packed: BMP128) -> IDX8:
    """The same matrix as IDX8-64, on the same device.

    Takes about 40 bytes of working memory per kept value. Raises ValueError for more than 65536 columns.
    """
    rows, columns = packed.shape
    if columns > MAX_COLUMNS:
        raise ValueError(f"IDX8-64 addresses up to {MAX_COLUMNS} columns; the matrix has {columns}")
    device = packed.vals.device
    mask = packed.mask()
    places = mask.view(-1).nonzero().view(-1)
    row_ends = mask.sum(dim=1).cumsum(0)
    chunk_start, chunk_row = _chunk_bounds(places, row_ends)

    blocks = -(-rows // BLOCK_ROWS)
    per_row = torch.bincount(chunk_row, minlength=blocks * BLOCK_ROWS)
    per_block = per_row.view(blocks, BLOCK_ROWS).amax(dim=1) if blocks else per_row
    start = torch.cat([per_block.new_zeros(1), per_block.cumsum(0)])
    chunks = int(start[-1])

    within_row = torch.arange(chunk_row.numel(), device=device) - (per_row.cumsum(0) - per_row)[chunk_row]
    slot = (start[chunk_row // BLOCK_ROWS] + within_row) * BLOCK_ROWS + chunk_row % BLOCK_ROWS
    length = torch.diff(chunk_start, append=chunk_start.new_full((1,), places.numel()))
    chunk = torch.repeat_interleave(torch.arange(chunk_row.numel(), device=device), length)
    target = slot[chunk] * CHUNK + torch.arange(places.numel(), device=device) - chunk_start[chunk]

    base = torch.zeros(chunks * BLOCK_ROWS, dtype=torch.int32, device=device)
    base[slot] = (places[chunk_start] - chunk_row * columns).to(torch.int32)
    index = torch.full((chunks * BLOCK_ROWS * CHUNK,), PADDING_INDEX, dtype=torch.uint8, device=device)
    index[target] = (places - places[chunk_start][chunk]).to(torch.uint8)
    vals = torch.zeros(chunks * BLOCK_ROWS * CHUNK, dtype=packed.vals.dtype, device=device)
    vals[target] = packed.vals[: packed.nnz]
    return IDX8(
        packed.shape,
        start.to(torch.int32),
        base.to(torch.uint16).view(chunks, BLOCK_ROWS),
        index.view(chunks, BLOCK_ROWS, CHUNK),
        vals.view(chunks, BLOCK_ROWS, CHUNK),
    )
