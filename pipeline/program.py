"""How this program was called, for messages that say what to type next."""

from __future__ import annotations

import sys
from pathlib import Path


def program() -> str:
    """``leap-prune`` where the installed command was called, else ``python pipeline/run.py``."""
    return "leap-prune" if Path(sys.argv[0]).stem == "leap-prune" else "python pipeline/run.py"
