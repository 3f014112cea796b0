"""The table of differences between learned variants and layer-wise ones, with paired standard errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.evaluation.paired import PairedDifference
from pipeline.formatting import points, signed
from pipeline.reporting import summary
from pipeline.results.schema import Difference, RunResults

NOTE = (
    "Differences are paired: over the same rows and documents, ± one standard error of the difference. nll: nats a "
    "token, below zero is better; acc: percentage points; gap closed: share of the gap between the layer-wise "
    "variant and the dense model, in perplexity and, which does not flatter large gaps, in nats. Each learned variant "
    "stands against the best layer-wise one on the first text, and against ADMM."
)


@dataclass(frozen=True)
class Pair:
    """A learned variant, or a mean over seeds, and what it is compared with."""

    name: str
    base: str
    found: Difference


@dataclass(frozen=True)
class Column:
    header: str
    text: Callable[[Pair], str]


def rows(results: RunResults) -> list[Pair]:
    """Learned variants against layer-wise ones, as far as they were compared."""
    return [
        Pair(summary.title(variant), base, found)
        for _, group in summary.groups(results)
        for variant in group
        if variant.get("rival")
        for base, found in variant.get("against", {}).items()
        if "@" in base
    ]


def columns(results: RunResults) -> list[Column]:
    """Texts and means, then single tasks where there are several."""
    texts, tasks = summary.datasets(results), summary.tasks(results)
    shown = [column for text in texts for column in (_nll(text), _gap(text), _gap_nats(text))]
    if tasks:
        shown.append(Column("mean acc", lambda row: _points(row.found.get("mean_accuracy"))))
    if clear := summary.above_chance(results):
        shown.append(Column(f"of {len(clear)} above chance", lambda row: _points(row.found.get("mean_above_chance"))))
    return shown + [_accuracy(task) for task in (tasks if len(tasks) > 1 else [])]


def _nll(text: str) -> Column:
    def cell(row: Pair) -> str:
        found = row.found["nll"].get(text)
        return signed(found["difference"], found["stderr"], 3) if found else "–"

    return Column(f"{text} nll", cell)


def _gap(text: str) -> Column:
    def cell(row: Pair) -> str:
        gap = row.found["nll"].get(text)
        return _share(gap["gap_closed"], gap["gap_closed_stderr"]) if gap and "gap_closed" in gap else "–"

    return Column("gap closed", cell)


def _gap_nats(text: str) -> Column:
    def cell(row: Pair) -> str:
        gap = row.found["nll"].get(text)
        if gap is None or "gap_closed_nats" not in gap:
            return "–"
        return _share(gap["gap_closed_nats"], gap["gap_closed_nats_stderr"])

    return Column("in nats", cell)


def _share(share: float, error: float | None) -> str:
    return f"{100 * share:.0f}{'' if error is None else f' ± {100 * error:.0f}'} %"


def _accuracy(task: str) -> Column:
    return Column(f"{task} acc", lambda row: _points(row.found["tasks"].get(task)))


def _points(found: PairedDifference | None) -> str:
    return points(found["difference"], found["stderr"]) if found else "–"
