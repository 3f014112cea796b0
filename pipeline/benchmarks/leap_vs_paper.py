"""The published settings and the short recipe at equal tokens: perplexity by tokens and by time, as a picture.

    python pipeline/run.py run --recipe nano-paper
    python pipeline/benchmarks/leap_vs_paper.py runs/nano-paper --out docs/leap-vs-paper.png

Reads the curves of one or more finished runs on the same model and text. All that is shown is measured on the held-out
rows that the learning runs were watched on, with hard masks of exactly the asked sparsity; the dense model and ADMM's
result are measured on them here. Time is that of the steps, without the measurements, and of the layer-wise start; runs
side by side on one machine slow each other down.
"""
# ruff: noqa: E402 - the path has to be set before our own modules are imported

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
]

from leap.scopes import layer_scope
from pipeline.config import PriorConfig, RunConfig
from pipeline.evaluation.perplexity import perplexity
from pipeline.execution.plan import make_plan
from pipeline.model import loading
from pipeline.reporting.plots.budget import Curve, Panel, budget_figure
from pipeline.stages.planned import Plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs, with results.json")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--against", nargs="+", default=["dense", "admm"], help="methods to show as horizontal lines")
    args = parser.parse_args()
    runs = [json.loads((run / "results.json").read_text()) for run in args.runs]
    plan = make_plan(RunConfig.model_validate(runs[0]["config"]))
    watched = {learn.watch_rows for learn in plan.config.learn.values()}
    if len(watched) > 1:
        parser.error(f"{args.runs[0]}: its learning runs were watched on different rows: {sorted(watched)}")
    (count,) = watched
    panels = [
        Panel(
            sparsity=sparsity,
            curves=list(itertools.chain.from_iterable(_curves(run, sparsity) for run in runs)),
            levels=_levels(plan, sparsity, args.against, count),
        )
        for sparsity in plan.config.sparsities
    ]
    figure = budget_figure(panels, "held-out text, hard mask")
    figure.savefig(args.out, dpi=150)
    print(json.dumps([_summary(panel) for panel in panels], indent=1))


def _curves(run: dict[str, Any], sparsity: float) -> list[Curve]:
    rows = {row["name"]: row for row in run["variants"]}
    curves = []
    for name, training in run["training"].items():
        row = rows[name]
        if row["target_sparsity"] != sparsity:
            continue
        settings = run["config"]["learn"][row["method"]]["settings"]
        prior = PriorConfig.row_name(settings["prior"], layer_scope(settings["prior"], settings["prior_scope"]))
        start = rows.get(f"{prior}@{sparsity:g}", {}).get("seconds", 0.0)
        tokens = settings["batch_rows"] * run["context_length"]
        masks = training["masks"]
        curves.append(
            Curve(
                name=row["method"],
                tokens=[(step + 1) * tokens for step in masks["step"]],
                seconds=[start + seconds for seconds in masks["seconds"]],
                perplexity=[math.exp(loss) for loss in masks["hard"]],
            )
        )
    return curves


def _levels(plan: Plan, sparsity: float, methods: list[str], count: int) -> dict[str, float]:
    rows = torch.from_numpy(plan.corpus("heldout").read().take(0, count))
    levels = {}
    for variant in plan.variants:
        if variant.method in methods and variant.sparsity in (None, sparsity):
            model = loading.load_model(
                plan.config.model, str(variant.export.directory.path()) if variant.export else None
            )
            levels[variant.method] = perplexity(model, rows, batch_rows=8)["perplexity"]
    return levels


def _summary(panel: Panel) -> dict[str, Any]:
    ends: dict[str, list[float]] = {}
    for curve in panel.curves:
        ends.setdefault(curve.name, []).append(round(curve.perplexity[-1], 3))
    return {"sparsity": panel.sparsity, "levels": panel.levels, "last": ends}


if __name__ == "__main__":
    main()
