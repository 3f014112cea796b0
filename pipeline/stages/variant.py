"""The models that a run compares."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.stages.harden import Harden
from pipeline.stages.learn import Learn
from pipeline.stages.origin import Origin
from pipeline.stages.prior import Prior
from pipeline.stages.source import variant_name


@dataclass(frozen=True)
class Variant:
    """The dense model, or a pruned one."""

    export: Harden | None = None
    """None for the dense model."""

    @property
    def method(self) -> str:
        return self.export.method if self.export else "dense"

    @property
    def sparsity(self) -> float | None:
        return self.export.sparsity if self.export else None

    @property
    def seed(self) -> int | None:
        """Of the learning run, where there are others that differ in nothing else."""
        return self.export.seed if self.export else None

    @property
    def name(self) -> str:
        return variant_name(self.method, self.seed, self.sparsity)

    @property
    def origin(self) -> Origin:
        """How it comes about."""
        return self.export.source.ORIGIN if self.export else "dense"

    @property
    def scope(self) -> str:
        """Within what the sparsity is exact; empty for the dense model."""
        return self.export.source.scope if self.export else ""

    @property
    def layer_wise_method(self) -> str | None:
        """The layer-wise method that its mask comes from, unless it was learned."""
        source = self.export.source if self.export else None
        return source.method if isinstance(source, Prior) else None

    @property
    def learned(self) -> Learn | None:
        """The learning run that its mask comes from, if it was learned."""
        return self.export.source.learned if self.export else None

    @property
    def key(self) -> str:
        """What measurements of it depend on, besides the dense model."""
        return self.export.key if self.export else "dense"
