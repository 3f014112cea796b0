"""A picture of every mask of an export: the share of kept weights by tile."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from leap.packed import MaskFile
from pipeline.storage import StageDir

VERSION = 1
TILES = 24
"""Tiles along the longer side of a matrix, at most."""
_FILE = "density.safetensors"


def run(stage: StageDir, export: StageDir) -> dict[str, Any]:
    """Reduce the masks of ``export`` to their density by tile."""
    with stage.work() as (directory, _):
        masks = MaskFile(export.path())
        save_file({name: tile_density(mask) for name, mask in masks.items()}, directory / _FILE)
    return stage.manifest() or {}


def tile_density(mask: Tensor) -> Tensor:
    """Share of kept weights in each tile of a mask [out, in]: float32 [rows, columns].

    The tiles are as square as the matrix allows, and each holds at least one weight.
    """
    longest = max(mask.shape)
    rows, columns = (max(1, min(side, round(TILES * side / longest))) for side in mask.shape)
    return adaptive_avg_pool2d(mask[None].float(), (rows, columns))[0]


def densities(stage: StageDir) -> dict[str, list[list[float]]]:
    """What a finished stage found, by the name of the layer, as plain numbers of three digits."""
    found = load_file(stage.path() / _FILE)
    return {name: torch.round(tiles, decimals=3).tolist() for name, tiles in found.items()}
