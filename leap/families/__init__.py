"""The families of masks. One is a file with its settings, a file with its gate, and an entry here."""

from __future__ import annotations

from typing import Annotated

from leap.families.base import MaskFamily, TaggedByKind
from leap.families.hard_concrete import HardConcrete
from leap.families.leap import Leap
from leap.families.maskllm import MaskLLM

_Any = Leap | MaskLLM | HardConcrete
#: The settings of any family; in a file, the field ``kind`` says of which.
Family = Annotated[_Any, TaggedByKind()]
#: By ``kind``.
FAMILIES: dict[str, type[_Any]] = {family.kind: family for family in (Leap, MaskLLM, HardConcrete)}

__all__ = ["FAMILIES", "Family", "HardConcrete", "Leap", "MaskFamily", "MaskLLM"]
