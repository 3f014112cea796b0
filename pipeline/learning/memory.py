"""How a training worker's heap is kept small."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE, _KEPT = 8 << 20, 512 << 20


def give_back_large_blocks() -> None:
    """Have glibc map every block of 8 MB or more on its own, for the rest of this process.

    By default the threshold grows with the blocks that are freed, up to 32 MiB. Gradients and scratch of the size of a
    weight matrix then lie in heaps, among longer-lived blocks, and what is free between these is not given back. Blocks
    of less stay in the heap when they are freed: mapping activations anew at every step costs a fifth of it
    (docs/log.md). Other C libraries are left alone, and so is a threshold that the environment sets.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LARGE)
            mallopt(_M_TRIM_THRESHOLD, _KEPT)
