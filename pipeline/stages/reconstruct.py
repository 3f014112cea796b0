"""New weights for a learned mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from leap.export import Pruned
from leap.layerwise import METHODS, reconstruct_sweep
from leap.surgery import prunable_linears
from pipeline.artifacts import prior_files as artifact
from pipeline.artifacts.learned_masks import learned_masks
from pipeline.artifacts.prior_files import PriorArtifact
from pipeline.config import PriorConfig
from pipeline.model.sizes import Sizes
from pipeline.stages import blockwise
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.learn import Learn
from pipeline.stages.source import MaskSource, variant_name
from pipeline.stages.stage import PinnedModel


@dataclass(frozen=True, eq=False)
class Reconstruct(MaskSource[PriorArtifact]):
    """New values for the weights that a learned mask keeps, written like the result of a layer-wise method."""

    KIND = PHASE = "reconstruct"
    VERSION = 2
    ORIGIN = "fitted"

    model: PinnedModel
    method: str
    """Name of the variant that they make, without sparsity."""
    sparsity: float
    learned_by: Learn
    config: PriorConfig
    """How many rows, and how many at a time."""
    calibration: Calibrate
    seed: int

    @property
    def item(self) -> str:
        return variant_name(self.method, self.learned_by.shown_seed, self.sparsity)

    @property
    def scope(self) -> str:
        return self.learned_by.scope

    @property
    def pattern(self) -> str:
        return self.learned_by.pattern

    @property
    def learned(self) -> Learn:
        return self.learned_by

    def inputs(self) -> list[object]:
        return [self.learned_by.key, [self.calibration.key, self.config.rows, self.config.batch_rows, self.seed]]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        steps = METHODS["optima"].steps  # the same problem
        operations = blockwise.sweep_operations(self.config, self.calibration, sizes, steps)
        return Cost(operations / machine.cpu, sizes.scores + sizes.export)

    def run(self) -> None:
        """Write masks and new weights, one file per decoder block."""
        config, model = self.config, self.model.config
        loaded = blockwise.load(model)
        family = self.learned_by.config.settings.family
        masks = learned_masks(self.learned_by.read(), prunable_linears(loaded), self.sparsity, family)
        with self.directory.work() as (directory, facts):
            results = reconstruct_sweep(
                loaded,
                blockwise.rows_of(self.calibration, config, self.seed),
                masks,
                batch_rows=config.batch_rows,
                device=blockwise.device(),
                spill_dir=blockwise.spill_dir(config),
            )
            artifact.write(directory, loaded, True, blockwise.block_by_block(loaded, model, results))
            facts |= {"sparsity": self.sparsity, "scope": self.scope, "changes_weights": True}

    def read(self) -> PriorArtifact:
        return PriorArtifact(self.directory.path())

    def pruned(self, linears: Mapping[str, nn.Linear], sparsity: float) -> tuple[Pruned, bool]:  # noqa: ARG002 - its own
        return self.read().pruned, True

    def seconds(self) -> float:
        return round(self.learned_by.seconds() + self.facts["seconds"], 1)
