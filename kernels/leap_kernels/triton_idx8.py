"""Where chunks of an IDX8-64 matrix lie, shared by the kernels that read it."""

import triton
import triton.language as tl


@triton.jit
def chunk_places(at, end, CHUNKS: tl.constexpr):
    """(first_base, base, first_slot, slot, present) of CHUNKS chunks of 4 rows from chunk ``at`` on.

    Bases lie at first_base + base, [CHUNKS, 4, 1], indices and values at first_slot + slot, [CHUNKS, 4, 64]. present:
    whether a chunk lies before ``end``.
    """
    ROWS: tl.constexpr = 4
    SLOTS: tl.constexpr = 64
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    base = chunk * ROWS + tl.arange(0, ROWS)[None, :, None]
    slot = base * SLOTS + tl.arange(0, SLOTS)[None, None, :]
    first_base = at.to(tl.int64) * ROWS
    return first_base, base, first_base * SLOTS, slot, at + chunk < end
