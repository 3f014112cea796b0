"""Layer-wise scores and masks, and for some methods new weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from leap.export import Pruned
from leap.layerwise import METHODS, Target, sweep
from leap.methods import LayerScope
from pipeline.artifacts import prior_files as artifact
from pipeline.artifacts.prior_files import PriorArtifact
from pipeline.config import Method, PriorConfig
from pipeline.model.sizes import Sizes
from pipeline.stages import blockwise
from pipeline.stages.calibrate import Calibrate
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.source import MaskSource, variant_name
from pipeline.stages.stage import PinnedModel

#: Method, within what it compares weights, sparsity.
PriorKey = tuple[Method, LayerScope, float]


@dataclass(frozen=True, eq=False)
class Prior(MaskSource[PriorArtifact]):
    """The model pruned with one method at one sparsity."""

    KIND = PHASE = "prior"
    VERSION = 2
    ORIGIN = "layer-wise"

    model: PinnedModel
    method: Method
    compared: LayerScope
    """Within what the method compares weights, where there is no pattern."""
    sparsity: float
    config: PriorConfig
    calibration: Calibrate
    seed: int

    @property
    def item(self) -> str:
        return variant_name(self.row_name, None, self.sparsity)

    @property
    def row_name(self) -> str:
        """What the table calls the method at its scope."""
        return self.config.row_name(self.method, self.compared)

    @property
    def scope(self) -> str:
        return self.config.scope_name(self.method, self.compared)

    @property
    def pattern(self) -> str:
        return self.config.pattern_name

    def inputs(self) -> list[object]:
        config = self.config
        rows = [self.calibration.key, config.rows, config.batch_rows, self.seed]
        target = [self.sparsity, self.scope, config.options.get(self.method, {})]
        return [self.model.key, self.method, target, rows if METHODS[self.method].needs != "none" else []]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:
        method = METHODS[self.method]
        operations = float(sizes.prunable)
        if method.needs != "none":
            operations = blockwise.sweep_operations(self.config, self.calibration, sizes, method.steps)
        return Cost(operations / machine.cpu, sizes.scores + (sizes.export if method.changes_weights else 0))

    def run(self) -> None:
        """Write scores and masks, one file per decoder block."""
        chosen, config, model = METHODS[self.method], self.config, self.model.config
        loaded = blockwise.load(model)
        rows = None if chosen.needs == "none" else blockwise.rows_of(self.calibration, config, self.seed)
        target = Target(self.sparsity, self.compared, config.pattern)
        with self.directory.work() as (directory, facts):
            results = sweep(
                loaded,
                rows,
                self.method,
                target,
                batch_rows=config.batch_rows,
                device=blockwise.device(),
                spill_dir=blockwise.spill_dir(config),
                options=config.options.get(self.method),
            )
            artifact.write(directory, loaded, chosen.changes_weights, blockwise.block_by_block(loaded, model, results))
            facts |= {
                "method": self.method,
                "sparsity": self.sparsity,
                "scope": self.scope,
                "changes_weights": chosen.changes_weights,
            }
            facts["rows"] = 0 if rows is None else len(rows)

    def read(self) -> PriorArtifact:
        return PriorArtifact(self.directory.path())

    def pruned(self, linears: Mapping[str, nn.Linear], sparsity: float) -> tuple[Pruned, bool]:  # noqa: ARG002 - its own
        return self.read().pruned, METHODS[self.method].changes_weights

    def seconds(self) -> float:
        return round(self.facts["seconds"], 1)
