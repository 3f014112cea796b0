"""A picture of every mask of an export: the share of kept weights by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from leap.packed import MaskFile
from pipeline.model.sizes import Sizes
from pipeline.stages.cost import Cost, Machine
from pipeline.stages.harden import Harden
from pipeline.stages.stage import Stage

TILES = 24
"""Tiles along the longer side of a matrix, at most."""
_FILE = "density.safetensors"

Tiles = dict[str, list[list[float]]]
"""By full module name, the share of kept weights in each tile of the matrix, of three digits."""


@dataclass(frozen=True, eq=False)
class MaskMap(Stage[Tiles]):
    """The density by tile of the masks of one export."""

    KIND = PHASE = "evaluate"
    VERSION = 1

    export: Harden

    @property
    def item(self) -> str:
        return f"{self.export.item}.map"

    @property
    def label(self) -> str:
        return self.export.item

    def inputs(self) -> list[object]:
        return [self.export.key]

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:  # noqa: ARG002 - of Stage
        return Cost(seconds=0.0)

    def run(self) -> None:
        """Reduce the masks to their density."""
        with self.directory.work() as (directory, _):
            masks = MaskFile(self.export.directory.path())
            save_file({name: tile_density(mask) for name, mask in masks.items()}, directory / _FILE)

    def read(self) -> Tiles:
        densities = load_file(self.directory.path() / _FILE)
        return {name: torch.round(tiles, decimals=3).tolist() for name, tiles in densities.items()}


def tile_density(mask: Tensor) -> Tensor:
    """Share of kept weights in each tile of a mask [out, in]: float32 [rows, columns].

    The tiles are as square as the matrix allows, and each holds at least one weight.
    """
    longest = max(mask.shape)
    rows, columns = (max(1, min(side, round(TILES * side / longest))) for side in mask.shape)
    return adaptive_avg_pool2d(mask[None].float(), (rows, columns))[0]
