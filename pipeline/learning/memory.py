"""How a training worker's heap is kept small."""

from __future__ import annotations

import ctypes
import os
import sys

from leap.settings import LearnSettings

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 512 << 20


def give_back_large_blocks(settings: LearnSettings) -> None:
    """Have glibc map large blocks on their own, for the rest of this process, so that freed ones are given back.

    By default the threshold grows with the blocks that are freed, up to 32 MiB. Gradients and scratch of the size of a
    weight matrix then lie in heaps, among longer-lived blocks, and what is free between these is kept: 2 to 4 bytes per
    masked weight. With a threshold of 1 MB it is not, but mapping activations anew at every step costs a fifth of the
    time (docs/log.md). So that is for settings that save memory, bfloat16 logits or several micro-batches; others get
    8 MB. A threshold that the environment sets is left alone, and so are other C libraries.
    """
    if sys.platform == "linux" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        saving = settings.optimiser == "adam8bit-bf16" or settings.microbatches > 1
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, (1 if saving else 8) << 20)
            if not saving:
                mallopt(_M_TRIM_THRESHOLD, _KEPT)
