"""A masked step against a dense one on a GPU: time, and peak memory in bytes a masked weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from leap_kernels.benchmarks.checkrun import CheckRun
from leap_kernels.benchmarks.graph_timing import event_seconds

from leap.benchmarks.shapes import Shape, random_model, random_rows
from leap.benchmarks.training_step import masked_step, plain_step
from leap.surgery import prunable_linears

# Without noise and distilled are the project's own settings; the published ones draw noise and have no teacher.
_VARIANTS: dict[str, dict[str, Any]] = {
    "plain, the model's own loss": {},
    "plain": {"own_loss": True},
    "masked, deterministic": {"noise": False},
    "masked, noise": {"noise": True},
    "masked, deterministic, adam8bit": {"noise": False, "optimiser": "adam8bit"},
    "masked, deterministic, adam8bit-bf16": {"noise": False, "optimiser": "adam8bit-bf16"},
    "masked, deterministic, adam8bit, matrix rate": {"noise": False, "optimiser": "adam8bit", "matrix_rate": 1e-3},
    "masked, noise, adam8bit": {"noise": True, "optimiser": "adam8bit"},
    "masked, deterministic, adam8bit, distilled": {"noise": False, "optimiser": "adam8bit", "distillation": 1.0},
}


def training(run: CheckRun) -> None:
    """1B whole and 8B as four blocks with its head, in bfloat16."""
    cases: list[tuple[Shape, int | None, int]] = [("llama-1b", None, 8192), ("llama-8b", 4, 8192)]
    small: list[tuple[Shape, int | None, int]] = [("smoke", None, 128)]
    for shape, blocks, tokens in run.affordable(run.pick(cases, small), str):
        plain: float | None = None
        for name, options in run.affordable(list(_VARIANTS.items()), lambda item: item[0]):
            with run.guarded(f"step {shape}, {name}"):
                seconds = _one_variant(run, shape, blocks, tokens, name, options, plain)
                plain = seconds if name == "plain" else plain
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def _one_variant(
    run: CheckRun,
    shape: Shape,
    blocks: int | None,
    tokens: int,
    name: str,
    options: dict[str, Any],
    plain: float | None,
) -> float:
    on_card = run.device.type == "cuda"
    model = random_model(shape, torch.bfloat16, run.device, blocks)
    numel = sum(linear.weight.numel() for linear in prunable_linears(model).values())
    rows = random_rows(model, tokens, run.pick(4096, 64))
    frozen = torch.cuda.memory_allocated() if on_card else 0
    make = plain_step if name.startswith("plain") else masked_step
    step: Callable[[], None] = make(model, rows, **options)
    step()
    if on_card:
        torch.cuda.reset_peak_memory_stats()
    seconds = event_seconds(step, run.device, run.pick(5, 1))
    median = seconds[len(seconds) // 2]
    about: dict[str, Any] = {"tokens": rows.numel(), "blocks": model.config.num_hidden_layers, "masked_weights": numel}
    if on_card:
        about["peak_bytes_per_masked_weight"] = (torch.cuda.max_memory_allocated() - frozen) / numel
        about["peak_bytes"] = torch.cuda.max_memory_allocated()
    if plain is not None:
        about["ratio_to_plain"] = median / plain
    run.figure(f"step {shape}, {name}", ms=1e3 * median, ms_min=1e3 * seconds[0], **about)
    return median
