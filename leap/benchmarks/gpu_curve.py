"""Perplexity of learned hard masks against the tokens they are learned from, on one GPU.

    python -m leap.benchmarks.gpu_curve --model DIR_OR_GGUF --rows rows.safetensors --out DIR --budget 400 \\
        [--points 0.6:300000 0.6:1000000:0.02 …] [--smoke]

A point is SPARSITY:TOKENS, or SPARSITY:TOKENS:RATE. ``--rows`` takes what pipeline/benchmarks/token_rows.py writes;
training goes through its rows in order and over again, and each record says how many distinct tokens that were and how
many passes. Records go to DIR/gpu_curve.jsonl; points that the budget has no time for are left out and named.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from leap_kernels.benchmarks.checkrun import CheckRun, Records
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from leap.api import layerwise_prior, prune
from leap.benchmarks.budgets import settings_for
from leap.checkpoint import Checkpoint, load_gguf
from leap.export import apply_masks
from leap.heldout import heldout_loss
from leap.layerwise import LayerResult
from leap.settings import LearnSettings
from leap.surgery import prunable_linears

POINTS = ("0.6:300000", "0.6:1000000", "0.6:3000000", "0.5:300000", "0.5:3000000", "0.6:10000000")
RATE = 0.01
_PRIOR_ROWS = 128


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face directory, or a .gguf file")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=400, help="seconds for everything")
    parser.add_argument("--points", nargs="+", default=list(POINTS), metavar="SPARSITY:TOKENS[:RATE]")
    parser.add_argument("--smoke", action="store_true", help="few steps and rows; runs on a CPU too")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not given.smoke:
        print("There is no CUDA device here. --smoke runs the same on a CPU with few steps.")
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    until = time.monotonic() + given.budget
    run = CheckRun(device, given.smoke, Records(given.out / "gpu_curve.jsonl"), "curve", until)
    rows = {name: tensor.to(torch.int32).long() for name, tensor in load_file(given.rows).items()}
    if given.smoke:
        rows = {name: tensor[:16] for name, tensor in rows.items()}
    model = _load(given.model, device)
    curve(run, model, rows, [_point(text) for text in given.points])
    return 1 if run.failed else 0


def curve(
    run: CheckRun, model: PreTrainedModel, rows: Mapping[str, Tensor], points: Sequence[tuple[float, int, float]]
) -> None:
    """Dense model, layer-wise prior and learned masks at each (sparsity, tokens, rate), on every text of ``rows``."""
    texts = {name: tensor for name, tensor in rows.items() if name != "calibration"}
    training = rows["calibration"]
    run.figure("dense", **_perplexities(model, texts))
    priors: dict[float, dict[str, LayerResult]] = {}
    tokens_per_second = 0.0
    for number, (sparsity, tokens, rate) in enumerate(points):
        left = run.until - time.monotonic()
        if tokens_per_second and tokens / tokens_per_second > left:
            run.figure("left out, the budget has no time for it", points=[list(point) for point in points[number:]])
            return
        with run.guarded(f"{sparsity:g} {tokens}"):
            if sparsity not in priors:
                priors[sparsity] = _prior(run, model, training[: run.pick(_PRIOR_ROWS, 8)], sparsity, texts)
            seconds = _learned(run, model, training, priors[sparsity], sparsity, tokens, rate, texts)
            tokens_per_second = tokens / seconds


def _prior(
    run: CheckRun, model: PreTrainedModel, rows: Tensor, sparsity: float, texts: Mapping[str, Tensor]
) -> dict[str, LayerResult]:
    began = time.perf_counter()
    prior = layerwise_prior(model, rows, sparsity=sparsity, settings=LearnSettings())
    seconds = time.perf_counter() - began
    with _weights_kept(model):
        apply_masks(model, lambda _, name: (prior[name].mask, prior[name].weight))
        run.figure(f"admm {sparsity:g}", seconds=seconds, tokens=rows.numel(), **_perplexities(model, texts))
    return prior


def _learned(
    run: CheckRun, model: PreTrainedModel, training: Tensor, prior: Mapping[str, LayerResult], sparsity: float,
    tokens: int, rate: float, texts: Mapping[str, Tensor],
) -> float:  # fmt: skip
    """Record one point; returns the seconds it took."""
    length = training.shape[1]
    settings = settings_for(run.pick(tokens, 2048), length, rate)
    seen = settings.steps * settings.batch_rows
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with _weights_kept(model):
        began = time.perf_counter()
        result = prune(model, training, sparsity=sparsity, settings=settings, prior=prior)
        seconds = time.perf_counter() - began
        run.figure(
            f"leap {sparsity:g}", rate=rate, steps=settings.steps, tokens_a_step=settings.batch_rows * length,
            tokens=seen * length, distinct_tokens=min(seen, len(training)) * length,
            passes=seen / len(training), seconds=seconds, tokens_per_s=seen * length / seconds,
            divergence=result.history[-1]["divergence"], **_perplexities(model, texts),
            **({"peak_bytes": torch.cuda.max_memory_allocated()} if run.device.type == "cuda" else {}),
        )  # fmt: skip
    return seconds


def _perplexities(model: PreTrainedModel, texts: Mapping[str, Tensor]) -> dict[str, float]:
    return {f"perplexity.{name}": math.exp(heldout_loss(model, rows)) for name, rows in texts.items()}


@contextmanager
def _weights_kept(model: PreTrainedModel) -> Iterator[None]:
    """The prunable weights are what they were when the context ends."""
    linears = prunable_linears(model)
    dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(dense[name])


def _load(path: Path, device: torch.device) -> PreTrainedModel:
    dtype = torch.bfloat16
    model: Any = load_gguf(path, dtype=dtype) if path.suffix == ".gguf" else Checkpoint(path).load(dtype=dtype)
    return model.to(device)


def _point(text: str) -> tuple[float, int, float]:
    sparsity, tokens, *rate = text.split(":")
    return float(sparsity), int(tokens), float(rate[0]) if rate else RATE


if __name__ == "__main__":
    sys.exit(main())
