"""``model.safetensors.index.json``: which file holds which tensor, as transformers writes it for several files.

Engines that have it take no other file of the directory for weights, so it stands beside a single file, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def write_index(directory: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Write the index of ``directory``.

    Args:
        files: name of each tensor → name of its file.
        total_bytes: size of all tensors.
    """
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def index_single_file(directory: Path) -> None:
    """Write the index where ``save_pretrained`` wrote ``model.safetensors`` alone."""
    path = directory / SAFE_WEIGHTS_NAME
    if not path.exists():
        return
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    with path.open("rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
    write_index(directory, dict.fromkeys(names, SAFE_WEIGHTS_NAME), path.stat().st_size - 8 - header)
