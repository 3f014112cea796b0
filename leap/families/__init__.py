"""The families of masks. One is a file with its settings, a file with its gate, and an entry here."""

from __future__ import annotations

from typing import Annotated

from leap.families.base import MaskFamily, TaggedByKind
from leap.families.leap import Leap

#: The settings of any family; in a file, the field ``kind`` says of which.
Family = Annotated[Leap, TaggedByKind()]
#: By ``kind``.
FAMILIES: dict[str, type[MaskFamily]] = {"leap": Leap}

__all__ = ["FAMILIES", "Family", "Leap", "MaskFamily"]
