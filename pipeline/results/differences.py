"""A variant against another on the same rows and documents, with paired standard errors; and which others to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.evaluation.paired import gap_closed, mean_difference, paired_accuracy, paired_nll
from pipeline.evaluation.scores import ZeroShot
from pipeline.results.measurements import Measured
from pipeline.results.schema import Difference, TextDifference

#: Standard errors that the dense model has to be above chance by, for a task to count as one that tells models apart.
CLEARLY = 2.0


def difference(dense: Measured | None, base: Measured, variant: Measured, clear: Sequence[str]) -> Difference:
    """``variant`` minus ``base``.

    Args:
        dense: what a gap is measured from; none where ``base`` is the dense model itself.
        clear: the tasks of the second mean, see :func:`clear_tasks`.
    """
    nll = {text: _on_text(text, dense, base, variant) for text in variant.texts}
    tasks = {task: paired_accuracy(base.tasks[task], scored) for task, scored in variant.tasks.items()}
    return Difference(
        nll=nll,
        tasks=tasks,
        mean_accuracy=mean_difference(list(tasks.values())) if tasks else None,
        mean_above_chance=mean_difference([tasks[task] for task in clear]) if clear else None,
    )


def _on_text(text: str, dense: Measured | None, base: Measured, variant: Measured) -> TextDifference:
    paired = paired_nll(base.texts[text], variant.texts[text])
    difference = TextDifference(difference=paired["difference"], stderr=paired["stderr"], pairs=paired["pairs"])
    if dense and (gap := gap_closed(dense.texts[text], base.texts[text], variant.texts[text])):
        difference["gap_closed"], difference["gap_closed_stderr"] = gap["share"], gap["stderr"]
        difference["gap_closed_nats"], difference["gap_closed_nats_stderr"] = gap["share_nats"], gap["stderr_nats"]
    return difference


def clear_tasks(dense: Mapping[str, ZeroShot]) -> list[str]:
    """The tasks on which the dense model is clearly above chance. Chosen by it alone, whatever the others score."""
    return [
        task
        for task, found in dense.items()
        if (found["metrics"]["acc"] or 0.0) - found["chance"] > CLEARLY * (found["metrics"]["acc_stderr"] or 0.0)
    ]


def best(rivals: Mapping[str, Measured]) -> str | None:
    """The name of the best of ``rivals``: the lowest perplexity on the first text, else the highest mean accuracy."""

    def badness(name: str) -> float:
        for text in rivals[name].texts.values():
            return text["nll"]
        return -sum(task["metrics"]["acc"] or 0.0 for task in rivals[name].tasks.values())

    return min(rivals, key=badness, default=None)
