"""What the evaluate stages found of one model, and the mean of what they found of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.evaluation.perplexity import Perplexity, perplexity_of
from pipeline.evaluation.scores import Document, ZeroShot, zero_shot_of
from pipeline.stages.evaluate import TaskAccuracy, TextPerplexity
from pipeline.stages.planned import Plan
from pipeline.stages.variant import Variant


@dataclass(frozen=True)
class Measured:
    """Row by row and document by document."""

    texts: dict[str, Perplexity]
    tasks: dict[str, ZeroShot]


def measured(plan: Plan, variant: Variant) -> Measured:
    """The finished measurements of a variant."""
    texts = {cell.subject: cell.read() for cell in plan.of(TextPerplexity) if cell.variant is variant}
    tasks = {cell.subject: cell.read() for cell in plan.of(TaskAccuracy) if cell.variant is variant}
    return Measured(texts, tasks)


def mean(several: Sequence[Measured]) -> Measured:
    """The mean of models measured on the same rows and documents, row by row and document by document.

    Its perplexity is the geometric mean.
    """
    first = several[0]
    return Measured(
        {text: _mean_perplexity([m.texts[text] for m in several]) for text in first.texts},
        {task: _mean_zero_shot([m.tasks[task] for m in several]) for task in first.tasks},
    )


def _mean_perplexity(several: Sequence[Perplexity]) -> Perplexity:
    rows = zip(*(found["nll_per_row"] for found in several), strict=True)
    return perplexity_of([fmean(row) for row in rows], tokens=several[0]["tokens"])


def _mean_zero_shot(several: Sequence[ZeroShot]) -> ZeroShot:
    first = several[0]
    by_document = [{(d["task"], d["doc"]): d["scores"] for d in found["per_document"]} for found in several]
    documents = [
        Document(
            task=d["task"],
            doc=d["doc"],
            scores={
                metric: fmean(scores[d["task"], d["doc"]][metric] for scores in by_document) for metric in d["scores"]
            },
        )
        for d in first["per_document"]
    ]
    return zero_shot_of(first["task"], documents, truncated=first["truncated"], chance=first["chance"])
