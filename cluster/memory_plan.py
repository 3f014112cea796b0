"""Memory of a training worker of a recipe, by what it is for and for several numbers of workers. Starts nothing.

    python cluster/memory_plan.py --recipe llama-3.1-8b --gpu-memory 80 --workers 1 2 4 8
    python cluster/memory_plan.py --recipe llama-3.1-8b learn.leap.settings.optimiser=adam8bit-bf16

Numbers are those of ``pipeline/run.py plan``; a worker of a recipe for GPUs has one GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from pipeline.config import (  # noqa: E402
    LearnConfig,
    RunConfig,
    recipe,
)
from pipeline.errors import UserError  # noqa: E402
from pipeline.model.sizes import Sizes, measure  # noqa: E402
from pipeline.stages.learn import worker_memory  # noqa: E402

#: Share of a GPU that a plan may fill: CUDA's own memory, buffers of NCCL and what the allocator cannot use take more.
USABLE = 0.85


def table(config: RunConfig, learn: LearnConfig, sizes: Sizes, workers: list[int], gpu_memory: float | None) -> Table:
    """A column for each number of workers, in GB.

    Args:
        gpu_memory: of one GPU in GB; with it, the last row says whether the plan fits.
    """
    dtype, length = config.model.dtype, config.data.context_length
    plans = [worker_memory(learn.model_copy(update={"workers": count}), dtype, length, sizes) for count in workers]
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown.add_column("GB of a worker")
    for count in workers:
        shown.add_column(f"{count} worker{'s' if count > 1 else ''}", justify="right")
    for part in plans[0]:
        shown.add_row(part, *(f"{plan[part] / 1e9:.3f}" for plan in plans))
    sums = [sum(plan.values()) / 1e9 for plan in plans]
    shown.add_row("together", *(f"{total:.3f}" for total in sums), style="bold")
    if gpu_memory:
        fits = ("yes" if total <= USABLE * gpu_memory else "no" for total in sums)
        shown.add_row(f"within {USABLE:.0%} of {gpu_memory:g} GB", *fits)
    return shown


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a .yaml file")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8], help="numbers of workers to compare")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="memory of one GPU")
    parser.add_argument("--deepspeed", action="store_true", help="print the DeepSpeed configuration instead")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a field of the recipe")
    args = parser.parse_intermixed_args(arguments)
    try:
        config = recipe.load(args.recipe, args.overrides)
        sizes = None if args.deepspeed else measure(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    for name, learn in config.learn.items():
        console.print(f"learn.{name} of {config.name}: {config.model.source}", style="bold")
        if sizes is None:
            # Not at the top: deepspeed probes the machine when it is imported.
            from pipeline.learning.zero import deepspeed_config

            print(json.dumps(deepspeed_config(learn, config.model), indent=2))
        else:
            console.print(table(config, learn, sizes, args.workers, args.gpu_memory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
