"""LEAP: learn which weights of a language model to keep.

import leap

result = leap.prune(model, rows, sparsity=0.5)
result.export("pruned/", tokenizer)
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("leap_kernels") is None:
    # A source checkout that nobody installed, such as the working directory of a Ray job.
    sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from leap.registration import register_quantiser

if TYPE_CHECKING:
    from leap.api import PruneResult, prune
    from leap.export import zeros
    from leap.layerwise.sweep import sweep
    from leap.lora import merge_lora
    from leap.packed import MaskFile
    from leap.schedules import Schedule
    from leap.settings import DensityControl, LearnSettings
    from leap.sparse_checkpoint import SparseCheckpointError, write_sparse
    from leap.sparse_model import load_sparse
    from leap.sparse_training import KeepSparse, keep_sparse

# Imported at first use: torch and transformers take seconds, and reading a recipe needs neither.
_HOME = {
    "DensityControl": "leap.settings",
    "KeepSparse": "leap.sparse_training",
    "LearnSettings": "leap.settings",
    "MaskFile": "leap.packed",
    "PruneResult": "leap.api",
    "Schedule": "leap.schedules",
    "SparseCheckpointError": "leap.sparse_checkpoint",
    "keep_sparse": "leap.sparse_training",
    "load_sparse": "leap.sparse_model",
    "merge_lora": "leap.lora",
    "prune": "leap.api",
    "sweep": "leap.layerwise.sweep",
    "write_sparse": "leap.sparse_checkpoint",
    "zeros": "leap.export",
}

__all__ = [
    "DensityControl",
    "KeepSparse",
    "LearnSettings",
    "MaskFile",
    "PruneResult",
    "Schedule",
    "SparseCheckpointError",
    "keep_sparse",
    "load_sparse",
    "merge_lora",
    "prune",
    "sweep",
    "write_sparse",
    "zeros",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'leap' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_quantiser()
