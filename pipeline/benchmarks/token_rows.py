"""The token rows of a recipe in one small file, for learning on a machine that has no pipeline.

    python pipeline/benchmarks/token_rows.py --recipe smollm2-long --out rows.safetensors [KEY=VALUE ...]

Writes uint16 [R, S] by role: ``calibration`` in a fixed random order, ``heldout``, and each evaluation text under its
name; ``leap.benchmarks.gpu_curve`` reads them. The rows are those that a run of the recipe packs.
"""
# ruff: noqa: E402 - the path has to be set before our own modules are imported

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
]

from pipeline.artifacts.packed_rows import PackedRows
from pipeline.config import recipe
from pipeline.errors import UserError
from pipeline.execution.plan import make_plan
from pipeline.execution.ray_cluster import start_ray
from pipeline.stages.calibrate import Calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_args()
    config = recipe.load(args.recipe, args.overrides)
    plan = make_plan(config)
    start_ray()
    rows: dict[str, torch.Tensor] = {}
    with tempfile.TemporaryDirectory() as directory:
        made: dict[str, Calibrate] = {}
        for planned in plan.of(Calibrate):
            role, apart = planned.role, tuple(made[other.role] for other in planned.apart)
            text = made[role] = replace(planned, store=directory, apart=apart, keep_texts=False)
            text.run()
            packed = PackedRows(text.directory.path(), shuffle=config.seed if role == "calibration" else None)
            tokens = torch.from_numpy(packed.take(0, len(packed)))
            if int(tokens.max()) >= 1 << 16:
                parser.error(f"token {int(tokens.max())} does not fit into 16 bits; the vocabulary is too large")
            rows[role] = tokens.to(torch.uint16)
            print(f"{role}: {len(packed)} rows of {tokens.shape[1]} from {text.facts['source']}")
    save_file(rows, args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
