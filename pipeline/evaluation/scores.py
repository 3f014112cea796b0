"""What was scored document by document, and the figures that follow from it. Light: imports nothing of lm-eval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TypedDict

from pipeline.evaluation.statistics import mean_and_stderr


class Document(TypedDict):
    """What a model scored on one document."""

    task: str
    """The single task it belongs to: in a group, the subject."""
    doc: int
    """Index in that task's evaluation split."""
    scores: dict[str, float]
    """By metric; ``acc`` (and ``acc_norm`` where the task has it) is 0 or 1."""


class ZeroShot(TypedDict):
    """Accuracy on one task."""

    task: str
    documents: int
    truncated: int
    """Documents of which some request was longer than the context and lost tokens on its left."""
    chance: float
    """Accuracy of guessing: mean over the documents of 1 / number of choices, zero where there are none to choose."""
    metrics: dict[str, float | None]
    """``acc``, ``acc_stderr`` and so on; a standard error is None for a single document."""
    per_document: list[Document]


class Sample(TypedDict):
    """A text that a model continued."""

    prompt: str
    continuation: str


def zero_shot_of(task: str, per_document: list[Document], *, truncated: int, chance: float) -> ZeroShot:
    """The result of ``task`` from at least one document; the subjects of a group are strata."""
    metrics: dict[str, float | None] = {}
    for metric in per_document[0]["scores"]:
        values = ((d["task"], d["scores"][metric]) for d in per_document)
        metrics[metric], metrics[f"{metric}_stderr"] = mean_and_stderr(strata(values))
    return ZeroShot(
        task=task,
        documents=len(per_document),
        truncated=truncated,
        chance=chance,
        metrics=metrics,
        per_document=per_document,
    )


def strata(values: Iterable[tuple[str, float]]) -> list[list[float]]:
    """The values by the name that stands before each."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in values:
        groups[name].append(value)
    return list(groups.values())
