"""``leap.prune`` of the embedded model on the CPU and on the GPU: the same course, the same quality."""

from __future__ import annotations

import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from leap_kernels.benchmarks.checkrun import CheckRun
from torch import Tensor
from transformers import AutoTokenizer

from leap.api import PruneResult, prune
from leap.checkpoint import Checkpoint
from leap.heldout import heldout_loss
from leap.settings import LearnSettings

MODEL = Path(__file__).resolve().parents[2] / "pipeline" / "nano" / "model"
_LENGTH, _HELDOUT = 256, 32


def pruning(run: CheckRun) -> None:
    """Held-out loss, history and masks of both devices."""
    rows = _rows()
    calibration, heldout = rows[:-_HELDOUT], rows[-_HELDOUT:]
    # Hardly any noise on the first logits, at the same distance from zero: each device draws its own.
    settings = LearnSettings(
        steps=run.pick(40, 3), batch_rows=8, microbatch_rows=8, learning_rate=0.1, matrix_rate=0.1
    ).with_family(init_std=1e-3, strength=1000.0)
    results: dict[str, tuple[PruneResult, float]] = {}
    for device in {run.device.type, "cpu"}:
        model: Any = Checkpoint(MODEL).load(dtype=torch.float32)
        model = model.to(device)
        dense = heldout_loss(model, heldout)
        began = time.perf_counter()
        result = prune(model, calibration, sparsity=0.5, settings=settings, prior_rows=run.pick(64, 8))
        seconds = time.perf_counter() - began
        results[device] = result, heldout_loss(model, heldout)
        run.figure(f"prune nano on {device}", seconds=seconds, dense_loss=dense, hard_loss=results[device][1],
                   first_loss=result.history[0]["loss"], last_loss=result.history[-1]["loss"])  # fmt: skip
    if run.device.type == "cuda":
        _compare(run, *results["cuda"], *results["cpu"])


def _rows() -> Tensor:
    """Help topics of this Python as token rows [R, 256]; the last ones are not learned from."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "\n\n".join(text for _, text in sorted(topics.items()))
    ids = tokenizer(text, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // _LENGTH * _LENGTH]).view(-1, _LENGTH)


def _compare(run: CheckRun, result: PruneResult, loss: float, on_cpu: PruneResult, cpu_loss: float) -> None:
    agreement = _agreement(result.packed_masks, on_cpu.packed_masks)
    ours, theirs = ([step["loss"] for step in r.history] for r in (result, on_cpu))
    history = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    run.check("prune nano: GPU as good as CPU", abs(loss - cpu_loss) < 0.01 and history < 0.05, hard_loss=loss,
              cpu_hard_loss=cpu_loss, largest_difference_in_history=history, masks_agree=agreement)  # fmt: skip


def _agreement(masks: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    different, total = 0, 0
    for name, packed in masks.items():
        changed = packed.cpu().view(torch.uint8) ^ others[name].cpu().view(torch.uint8)
        different += sum(int(((changed >> bit) & 1).sum()) for bit in range(8))
        total += 8 * packed.nbytes
    return 1 - different / total
