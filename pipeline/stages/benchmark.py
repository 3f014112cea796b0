"""Speed of a pruned model with its own masks: its matrices, and batch-1 decoding against the dense model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from leap.packed import MaskFile
from pipeline.config import BenchmarkConfig
from pipeline.evaluation.speed import Speed
from pipeline.model import loading
from pipeline.model.sizes import Sizes
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.harden import Harden
from pipeline.stages.stage import PinnedModel, Place, Stage

_RESULT = "speed.json"
#: Seconds of a token outside the linear layers: seen on models of six and thirty blocks.
_TOKEN_OVERHEAD = 5e-3


@dataclass(frozen=True, eq=False)
class Benchmark(Stage[Speed]):
    """The speed of one export in every dtype that is asked for, on the GPU if the node has one."""

    KIND = PHASE = "benchmark"
    VERSION = 1
    PLACE = Place.NODE

    model: PinnedModel
    export: Harden
    config: BenchmarkConfig

    @property
    def item(self) -> str:
        return self.export.item

    def inputs(self) -> list[object]:
        return [self.export.key, self.config]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        """Products with each shape, then rounds of decoding and one more for each of two parts.

        A token reads every linear layer's weights; the packed ones are counted like dense ones.
        """
        config, seconds = self.config, 0.0
        for dtype in config.dtypes:
            token = _TOKEN_OVERHEAD + sizes.linear * getattr(torch, dtype).itemsize / machine.memory_speed
            seconds += sizes.shapes * config.seconds + 2 * (config.rounds + 2) * config.tokens * token
        return Cost(seconds)

    def run(self) -> None:
        """Measure and write the result."""
        from leap_kernels.benchmarks.timing import machine

        from pipeline.evaluation import decode_speed, matrix_speed

        config = self.config
        with self.directory.work() as (directory, facts), _threads(config.threads):
            masks = MaskFile(self.export.directory.path())
            speed = Speed(machine=machine(), matrices=[], decode={})
            for dtype in config.dtypes:
                dense = self._load(dtype)
                speed["matrices"] += matrix_speed.compare(dense, masks, getattr(torch, dtype), config.seconds)
                sparse = decode_speed.packed_copy(dense, masks)
                speed["decode"][dtype] = decode_speed.compare(dense, sparse, config.tokens, config.rounds)
            (directory / _RESULT).write_text(json.dumps(speed))
            facts["machine"] = speed["machine"]

    def read(self) -> Speed:
        speed: Speed = json.loads((self.directory.path() / _RESULT).read_text())
        return speed

    def _load(self, dtype: str) -> PreTrainedModel:
        as_measured = self.model.config.model_copy(update={"dtype": dtype})
        loaded: Any = loading.load_model(as_measured, self.export.directory.path())
        return loaded.cuda() if torch.cuda.is_available() else loaded


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
