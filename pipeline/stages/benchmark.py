"""Speed of a pruned model with its own masks: its matrices, and batch-1 decoding against the dense model.

Nothing else may run beside a measurement: ``Flow`` starts these tasks one at a time, with all CPUs of a node.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from leap_kernels.benchmarks.timing import machine
from transformers import PreTrainedModel

from leap.packed import MaskFile
from pipeline import models
from pipeline.config import BenchmarkConfig, ModelConfig
from pipeline.storage import StageDir

VERSION = 1
RESULT = "speed.json"


def run(stage: StageDir, model: ModelConfig, export: StageDir, settings: BenchmarkConfig) -> dict[str, Any]:
    """Measure an export in every number type that is asked for, on the GPU if the node has one."""
    from pipeline.speed import decode, matrices

    with stage.work() as (directory, facts), _threads(settings.threads):
        masks = MaskFile(export.path())
        found: dict[str, Any] = {"machine": machine(), "matrices": [], "decode": {}}
        for dtype in settings.dtypes:
            dense = _load(model, export, dtype)
            found["matrices"] += matrices.compare(dense, masks, getattr(torch, dtype), settings.seconds)
            sparse = decode.packed_copy(dense, masks)
            found["decode"][dtype] = decode.compare(dense, sparse, settings.tokens, settings.rounds)
        (directory / RESULT).write_text(json.dumps(found))
        facts["machine"] = found["machine"]
    return stage.manifest() or {}


def result(stage: StageDir) -> dict[str, Any]:
    """What a finished measurement found: ``matrices`` and, by number type, ``decode``."""
    return json.loads((stage.path() / RESULT).read_text())


def _load(model: ModelConfig, export: StageDir, dtype: str) -> PreTrainedModel:
    loaded: Any = models.load_model(model.model_copy(update={"dtype": dtype}), export.path())
    return loaded.cuda() if torch.cuda.is_available() else loaded


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
