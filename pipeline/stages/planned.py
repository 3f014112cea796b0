"""What a run consists of: every piece of work, in the order in which it is done, and what it compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.config import RunConfig
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.prior import Prior, PriorKey
from pipeline.stages.stage import Stage
from pipeline.stages.variant import Variant

S = TypeVar("S", bound=Stage[Any])


@dataclass(frozen=True)
class Plan:
    config: RunConfig
    """With the embedded text in place of files that do not exist."""
    notes: list[str]
    """What a user has to be told of that."""
    stages: list[Stage[Any]]
    """All pieces of work in order."""
    variants: list[Variant]
    """The rows of the table, the dense model first."""

    def of(self, kind: type[S]) -> list[S]:
        """The pieces of work of one kind."""
        return [stage for stage in self.stages if isinstance(stage, kind)]

    def corpus(self, role: str) -> Calibrate:
        """The work that packs the text for ``calibration``, ``heldout`` or an evaluation text of this name."""
        return next(stage for stage in self.of(Calibrate) if stage.role == role)

    @property
    def priors(self) -> dict[PriorKey, Prior]:
        """By method, within what it compares weights, and sparsity."""
        return {(prior.method, prior.compared, prior.sparsity): prior for prior in self.of(Prior)}

    @property
    def directory(self) -> str:
        """Where the run keeps its own records and its report."""
        return f"{self.config.output.rstrip('/')}/{self.config.name}"
