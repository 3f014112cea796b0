"""The layer-wise methods by name."""

from __future__ import annotations

from leap.layerwise.admm import admm
from leap.layerwise.alps import alps
from leap.layerwise.base import Method
from leap.layerwise.magnitude import magnitude
from leap.layerwise.optima import optima
from leap.layerwise.sparsegpt import sparsegpt
from leap.layerwise.thanos import thanos
from leap.layerwise.wanda import wanda

METHODS: dict[str, Method] = {m.name: m for m in (magnitude, wanda, sparsegpt, thanos, admm, alps, optima)}
