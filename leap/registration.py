"""Makes transformers know the quantiser ``leap`` after ``import leap``, which does not import transformers for that."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: Where transformers keeps its table of quantisers.
_TABLE = "transformers.quantizers.auto"
_QUANTISER = "leap.quantiser"


def register_quantiser() -> None:
    """Enter the quantiser now, or as soon as transformers loads its table."""
    if _TABLE in sys.modules:
        importlib.import_module(_QUANTISER)
    else:
        sys.meta_path.insert(0, _TableFinder())


class _TableFinder(MetaPathFinder):
    """Finds the table as others do, once, and enters the quantiser after the table has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(_QUANTISER)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
