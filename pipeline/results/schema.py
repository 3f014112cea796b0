"""The results of a pipeline run as plain data: what the stages hand in and every form of the report is made of.

Everything is JSON. Any key may be missing: a report can be made after any stage.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from pipeline.evaluation.paired import PairedDifference
from pipeline.evaluation.scores import Sample
from pipeline.evaluation.speed import Speed
from pipeline.stages.origin import Origin


class Model(TypedDict, total=False):
    """The model that was pruned."""

    name: str
    parameters: int
    prunable_parameters: int
    """Weights of the linear layers inside the decoder blocks: what sparsity counts."""
    block_parameters: int
    """Weights of the decoder blocks, those that are not prunable too."""
    revision: str


class Perplexity(TypedDict, total=False):
    """Perplexity on one data set."""

    perplexity: float
    stderr_nll: float | None
    """Standard error of the mean negative log-likelihood, in nats per token."""
    tokens: int


class TaskAccuracy(TypedDict, total=False):
    """Accuracy on one zero-shot task, as a fraction."""

    acc: float
    acc_stderr: float | None
    documents: int


class MeanAccuracy(TypedDict, total=False):
    """Mean accuracy over the tasks, as a fraction."""

    acc: float
    stderr: float | None


class TextDifference(PairedDifference):
    """On one text, over the same rows, in nats per token; below zero is better."""

    gap_closed: NotRequired[float]
    """Share of the gap in perplexity between the other variant and the dense model; absent where there is none."""
    gap_closed_stderr: NotRequired[float | None]
    gap_closed_nats: NotRequired[float]
    """The same of the gap in nats a token, which does not flatter large gaps."""
    gap_closed_nats_stderr: NotRequired[float | None]


class Difference(TypedDict):
    """A variant minus another, with paired standard errors."""

    nll: dict[str, TextDifference]
    tasks: dict[str, PairedDifference]
    """As fractions; above zero is better."""
    mean_accuracy: PairedDifference | None
    mean_above_chance: PairedDifference | None


class Spread(TypedDict, total=False):
    """Standard deviations between seeds."""

    nll: dict[str, float]
    """By text, in nats per token: relative to the perplexity, to first order."""
    tasks: dict[str, float]
    mean_accuracy: float
    mean_above_chance: float


class Scores(TypedDict):
    """What was measured of one model, by text and by task."""

    perplexity: dict[str, Perplexity]
    tasks: dict[str, TaskAccuracy]
    mean_accuracy: MeanAccuracy | None
    mean_above_chance: MeanAccuracy | None


class Compared(TypedDict):
    """One model against others."""

    rival: str | None
    against: dict[str, Difference]


class JsonRow(TypedDict, total=False):
    """One model of the comparison: the dense one or a pruned one."""

    name: str
    """``dense`` or method and sparsity, such as ``wanda@0.5``."""
    method: str
    origin: Origin
    target_sparsity: float | None
    """What was asked for; ``None`` for the dense model."""
    real_sparsity: float
    """What was counted in the exported weights, over the prunable ones."""
    block_sparsity: float
    """The same zeros over all weights of the decoder blocks."""
    scope: str
    """Over what the sparsity is exact: global, layer or row."""
    weights_changed: bool
    """Whether the kept weights differ from the dense model's."""
    perplexity: dict[str, Perplexity]
    tasks: dict[str, TaskAccuracy]
    mean_accuracy: MeanAccuracy | None
    mean_above_chance: MeanAccuracy | None
    """Over ``clear_tasks`` of the results."""
    against: dict[str, Difference]
    """This variant minus the dense model and, where it was learned, minus layer-wise ones, by their names."""
    rival: str | None
    """The best layer-wise variant of the same sparsity, by perplexity on the first text, where this one was learned."""
    seed: int
    """Of the learning run."""
    mean: str
    """The row that this one, of a single seed, went into."""
    seeds: list[int]
    """Of the variants that this row is the mean of: row by row, document by document, the perplexity geometric."""
    spread: Spread
    """Between those seeds."""
    seconds: float
    """Time to make the mask."""
    training_tokens: int
    """Tokens that the mask was learned from; zero where it was not learned."""
    decode_tokens_per_second: float
    """Measured speed of generation, where it was."""
    speed: Speed
    directory: str
    sparsity_per_layer: dict[str, float]
    """By full module name, such as ``model.layers.0.self_attn.q_proj``."""
    mask_map: dict[str, list[list[float]]]
    """By full module name, the share of kept weights in each tile of the matrix."""
    samples: list[Sample]


class MaskLosses(TypedDict, total=False):
    """Held-out loss, in nats per token, with the three readings of the same logits."""

    step: list[int]
    seconds: list[float]
    """Time of all steps so far, without these measurements."""
    sampled: list[float]
    mean: list[float]
    hard: list[float]


class Training(TypedDict, total=False):
    """The curves of one learned variant; the lists are as long as ``step``."""

    step: list[int]
    loss: list[float]
    lm_loss: list[float]
    density: list[float]
    expected_density: list[float]
    target_density: float
    temperature: list[float]
    scale: list[float]
    lagrangian: list[float]
    learning_rate: list[float]
    masks: MaskLosses
    tokens_per_second: float


class Calibration(TypedDict, total=False):
    """How one split was tokenised and packed."""

    documents: int
    tokens: int
    rows: int
    dropped_tail_tokens: int
    tokens_per_second: float
    source: str


class StageTime(TypedDict):
    """One stage of the pipeline."""

    name: str
    seconds: float
    """How long it took; for a cached stage, how long it took in the earlier run that made the result."""
    cached: bool


class Tracking(TypedDict, total=False):
    """Where the records lie, as ``Tracker.info`` gives it."""

    uri: str
    run_id: str
    ui_command: str
    records: str
    note: str


class RunResults(TypedDict, total=False):
    """Everything a report is made of."""

    recipe: str
    model: Model
    created: str
    """ISO 8601."""
    context_length: int
    variants: list[JsonRow]
    chance: dict[str, float]
    """Accuracy of guessing, by task, from the number of choices of its documents."""
    clear_tasks: list[str]
    """The tasks on which the dense model is more than two standard errors above chance."""
    training: dict[str, Training]
    """By the name of the variant that was learned."""
    calibration: dict[str, Calibration]
    """By split."""
    stages: list[StageTime]
    environment: dict[str, Any]
    config: dict[str, Any]
    """The resolved recipe."""
    warnings: list[str]
    tracking: Tracking
