"""How a training worker's heap is kept small."""

from __future__ import annotations

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE = 1 << 20


def give_back_large_blocks() -> None:
    """Have glibc map every block of a megabyte or more on its own, for the rest of this process.

    By default the threshold grows with the blocks that are freed, up to 32 MiB. Gradients and scratch of the size of a
    weight matrix then lie in heaps, among longer-lived blocks, and what is free between these is not given back: 2 to 3
    bytes per masked weight (docs/log.md). Other C libraries are left alone.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
