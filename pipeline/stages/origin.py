"""How a model of a comparison came about."""

from __future__ import annotations

from typing import Literal

Origin = Literal["dense", "layer-wise", "learned", "fitted"]
"""As it was, pruned by a layer-wise method, with a learned mask, or with a learned mask and new weights made for it."""

BY_STAGE: dict[str, Origin] = {"prior": "layer-wise", "learn": "learned", "reconstruct": "fitted"}
"""By the stage that the mask comes from."""
