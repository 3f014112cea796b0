"""IDX8-64: a sparse matrix format with one byte of column index per value, derived from BMP128 when a model is loaded.

It reads more bytes than BMP128 (1.52 to 1.57 per weight at half density and 2-byte values, against 1.16) and takes
three fifths of its instructions, which is what counts where memory outruns the instructions of a GPU: see
:mod:`leap_kernels.dispatch`.

A row's kept values are cut into chunks of up to 64, from the left. A chunk ends early where its next value would lie
255 columns or more to the right of its first, or in another panel of 4096 columns; 4 neighbouring rows get the same
number of chunks in a panel. With B = ceil(N / 4) blocks of rows, P = ceil(K / 4096) panels and C chunks for every row
of a block, counted over blocks and panels, the chunks lie in the order [C, 4 rows]:

    start     int32  [B * P + 1]   block b has the chunks [start[b * P + p], start[b * P + p + 1]) of each of its 4 rows
                                   in panel p
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
PANEL = 4096  # columns whose x fits in a part of a GPU's shared memory
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
    def panels(self) -> int:
        return -(-self.shape[1] // PANEL)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def _flat_positions(self) -> tuple[Tensor, Tensor]:
        """(which slots hold a value: bool [C, 4, 64]; their places in the row-major matrix: int64 [nnz])."""
        chunks = self.base.shape[0]
        device = self.base.device
        part = torch.searchsorted(self.start[1:].contiguous(), torch.arange(chunks, device=device), right=True)
        row = (part // self.panels)[:, None] * BLOCK_ROWS + torch.arange(BLOCK_ROWS, device=device)
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

    def div_(self, divisor: float) -> None:
        """Divide all values in place: some models (RWKV) do so to a layer's weight when they first run."""
        self.vals.div_(divisor)

    def with_vals(self, vals: Tensor) -> "IDX8":
        """The same pattern with other values, of any dtype that the format takes."""
        return IDX8(self.shape, self.start, self.base, self.index, vals)

    def tensors(self) -> dict[str, Tensor]:
        """Its parts by name, in the order of the fields."""
        return {"start": self.start, "base": self.base, "index": self.index, "vals": self.vals}

    def to_bmp128(self) -> BMP128:
        """The same matrix as :func:`from_bmp128` was given it."""
        return pack(self.unpack(), self.mask())


def _chunk_bounds(places: Tensor, part_ends: Tensor) -> tuple[Tensor, Tensor]:
    """Where chunks start among the kept values, and their part: a row's columns in one panel.

    places: int64 [nnz], sorted places of the kept values in the row-major matrix; part_ends: int64 [parts], how many of
    them lie in the parts up to and including this one. Returns two int64 [chunks], sorted by start.

    The loop takes one chunk of every part at a time, so it runs as often as the fullest part has chunks.
    """
    position = torch.cat([part_ends.new_zeros(1), part_ends])[:-1]
    part = torch.arange(part_ends.numel(), device=places.device)
    starts, parts = [position[:0]], [part[:0]]
    while True:
        open_ = position < part_ends[part]
        position, part = position[open_], part[open_]
        if position.numel() == 0:
            break
        starts.append(position)
        parts.append(part)
        reach = torch.searchsorted(places, places[position] + PADDING_INDEX)
        position = torch.minimum(position + CHUNK, torch.minimum(reach, part_ends[part]))
    start, order = torch.cat(starts).sort()
    return start, torch.cat(parts)[order]


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
    panels, blocks = -(-columns // PANEL), -(-rows // BLOCK_ROWS)
    borders = torch.arange(rows, device=device)[:, None] * columns + torch.arange(panels, device=device) * PANEL
    # A part starts where the one before ends.
    part_ends = torch.searchsorted(places, torch.cat([borders.view(-1)[1:], borders.new_full((1,), mask.numel())]))
    chunk_start, chunk_part = _chunk_bounds(places, part_ends[: borders.numel()])
    chunk_row, chunk_panel = chunk_part // max(1, panels), chunk_part % max(1, panels)

    # Chunks of each part, as [blocks, panels, 4 rows]: the order they are stored in.
    stored_part = (chunk_row // BLOCK_ROWS * panels + chunk_panel) * BLOCK_ROWS + chunk_row % BLOCK_ROWS
    per_part = torch.bincount(stored_part, minlength=blocks * panels * BLOCK_ROWS).view(-1, BLOCK_ROWS)
    longest = per_part.amax(dim=1) if len(per_part) else per_part.view(-1)
    start = torch.cat([longest.new_zeros(1), longest.cumsum(0)])
    chunks = int(start[-1])

    counts = torch.bincount(chunk_part, minlength=borders.numel())
    within_part = torch.arange(chunk_part.numel(), device=device) - (counts.cumsum(0) - counts)[chunk_part]
    slot = (start[stored_part // BLOCK_ROWS] + within_part) * BLOCK_ROWS + chunk_row % BLOCK_ROWS
    length = torch.diff(chunk_start, append=chunk_start.new_full((1,), places.numel()))
    chunk = torch.repeat_interleave(torch.arange(chunk_part.numel(), device=device), length)
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
