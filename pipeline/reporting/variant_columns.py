"""The table of results: its columns for people, its rows for machines."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.formatting import count, duration, percent, perplexity, short_percent
from pipeline.reporting import summary
from pipeline.results.schema import Difference, JsonRow, RunResults


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: how a variant's cell reads and, where one is better than another, by what it is compared."""

    header: str
    text: Callable[[JsonRow], str]
    value: Callable[[JsonRow], float | None] = lambda _: None
    better: Literal["low", "high"] | None = None

    def best(self, variants: list[JsonRow]) -> float | None:
        """The best value among ``variants``, or ``None`` where there is nothing to choose."""
        values = [x for v in variants if (x := self.value(v)) is not None and math.isfinite(x)]
        if self.better is None or len(set(values)) < 2:
            return None
        return min(values) if self.better == "low" else max(values)

    def is_best(self, variant: JsonRow, among: list[JsonRow]) -> bool:
        """Whether no other is better, and some is worse."""
        best = self.best(among)
        return best is not None and self.value(variant) == best


ASKED = Column(header="asked", text=lambda v: _asked(v))
REAL = Column(header="real", text=lambda v: percent(v.get("real_sparsity"), 2))
OF_BLOCKS = Column(header="of blocks", text=lambda v: percent(v.get("block_sparsity"), 2))
SCOPE = Column(header="scope", text=lambda v: _pruned(v, v.get("scope") or "–"))
WEIGHTS = Column(header="weights", text=lambda v: _pruned(v, "updated" if v.get("weights_changed") else "kept"))
TIME = Column(header="time", text=lambda v: _pruned(v, duration(v.get("seconds"))))
TOKENS = Column(header="learned from", text=lambda v: f"{count(v['training_tokens'])} tokens" if _learned(v) else "–")
SPEED = Column(
    header="decode tokens/s",
    text=lambda v: count(v.get("decode_tokens_per_second")),
    value=lambda v: v.get("decode_tokens_per_second"),
    better="high",
)


def quality_columns(results: RunResults) -> list[Column]:
    """Perplexity on each data set, then the mean accuracy."""
    columns = [_perplexity_column(dataset) for dataset in summary.datasets(results)]
    if any(v.get("mean_accuracy") for v in results.get("variants", [])):
        columns.append(_mean_column("mean acc %", "mean_accuracy"))
    if clear := summary.above_chance(results):
        columns.append(_mean_column(f"of {len(clear)} above chance", "mean_above_chance"))
    return columns


def task_columns(results: RunResults) -> list[Column]:
    """Accuracy on each task."""
    return [_task_column(task) for task in summary.tasks(results)]


_FACTS = (
    "name",
    "method",
    "origin",
    "target_sparsity",
    "real_sparsity",
    "block_sparsity",
    "scope",
    "weights_changed",
    "seconds",
)


def result_rows(results: RunResults) -> list[dict[str, Any]]:
    """One flat row for each variant, with raw numbers: for ``Run.log_table``."""
    rows = []
    for variant in results.get("variants", []):
        row: dict[str, Any] = {key: variant.get(key) for key in _FACTS}
        if "decode_tokens_per_second" in variant:
            row["decode_tokens_per_second"] = variant["decode_tokens_per_second"]
        for dataset, measured in variant.get("perplexity", {}).items():
            row[f"perplexity/{dataset}"] = measured.get("perplexity")
            row[f"stderr_nll/{dataset}"] = measured.get("stderr_nll")
        for task, accuracy in variant.get("tasks", {}).items():
            row[f"acc/{task}"] = accuracy.get("acc")
            row[f"acc_stderr/{task}"] = accuracy.get("acc_stderr")
        mean = variant.get("mean_accuracy") or {}
        row |= {"mean_acc": mean.get("acc"), "mean_acc_stderr": mean.get("stderr")}
        for base, found in variant.get("against", {}).items():
            row |= _difference_cells(f"against/{base.rsplit('@', 1)[0]}", found)
        rows.append(row)
    return rows


_GAPS = ("gap_closed", "gap_closed_stderr", "gap_closed_nats", "gap_closed_nats_stderr")


def _difference_cells(prefix: str, found: Difference) -> dict[str, float | None]:
    cells: dict[str, float | None] = {}
    for dataset, nll in found.get("nll", {}).items():
        cells |= {f"{prefix}/nll/{dataset}": nll["difference"], f"{prefix}/nll_stderr/{dataset}": nll["stderr"]}
        cells |= {f"{prefix}/{key}/{dataset}": nll.get(key) for key in _GAPS}  # type: ignore[misc]
    if mean := found.get("mean_accuracy"):
        cells |= {f"{prefix}/mean_acc": mean["difference"], f"{prefix}/mean_acc_stderr": mean["stderr"]}
    return cells


def cost_columns(results: RunResults) -> list[Column]:
    """What the masks cost, and the speed of generation where it was measured."""
    variants = results.get("variants", [])
    speed = [SPEED] if any("decode_tokens_per_second" in v for v in variants) else []
    return [TIME, *([TOKENS] if any(map(_learned, variants)) else []), *speed]


def _learned(variant: JsonRow) -> bool:
    return bool(variant.get("training_tokens"))


def _pruned(variant: JsonRow, text: str) -> str:
    return "–" if variant.get("target_sparsity") is None else text


def _asked(variant: JsonRow) -> str:
    target = variant.get("target_sparsity")
    return "–" if target is None else short_percent(target)


def _perplexity_column(dataset: str) -> Column:
    return Column(
        header=f"{dataset} ppl",
        text=lambda v: perplexity(summary.perplexity_of(v, dataset), summary.error_nll_of(v, dataset)),
        value=lambda v: summary.perplexity_of(v, dataset),
        better="low",
    )


def _task_column(task: str) -> Column:
    return Column(
        header=task,
        text=lambda v: _accuracy(v.get("tasks", {}).get(task, {}).get("acc"), summary.error_of_task(v, task)),
        value=lambda v: v.get("tasks", {}).get(task, {}).get("acc"),
        better="high",
    )


def _mean_column(header: str, key: summary.MeanKey) -> Column:
    return Column(
        header=header,
        text=lambda v: _accuracy(summary.mean_accuracy_of(v, key), summary.error_of_mean(v, key)),
        value=lambda v: summary.mean_accuracy_of(v, key),
        better="high",
    )


def _accuracy(accuracy: float | None, error: float) -> str:
    if accuracy is None:
        return "–"
    return f"{100 * accuracy:.1f}{f' ± {100 * error:.1f}' if error else ''}"
