"""The loop of mask learning, the same for one process and for many."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from leap.learner import MaskLearner
from leap.schedules import warmup_then_cosine

#: Gives rows [R, S] on the model's device, from the number of the first, counted over the whole run, and R.
Rows = Callable[[int, int], Tensor]


def learn(
    learner: MaskLearner, rows: Rows, after_step: Callable[[dict[str, float]], None], first_step: int = 0
) -> None:
    """Optimise the logits of ``learner``'s engine; collective.

    Args:
        rows: this process's share is taken from it, micro-batch by micro-batch.
        after_step: called with the metrics of each step once the logits have moved. What it does is up to the caller:
            keep them, watch the masks, write a checkpoint.
        first_step: of a run that continues.

    Raises:
        NonFiniteLossError: the loss became NaN or infinite, the same in every process; the logits are those of the last
            finite step.
    """
    settings = learner.settings
    for step in range(first_step, settings.steps):
        factor = warmup_then_cosine(step, settings.steps, settings.warmup_steps, settings.final_rate)
        rate = settings.learning_rate * factor
        metrics = _step(learner, rows, step, rate)
        after_step(metrics | {"step": step, "learning_rate": rate})


def _step(learner: MaskLearner, rows: Rows, step: int, rate: float) -> dict[str, float]:
    settings, engine = learner.settings, learner.engine
    share = settings.microbatches // engine.world
    metrics: dict[str, float] = {}
    for number in range(share):
        microbatch = engine.rank * share + number
        first = step * settings.batch_rows + microbatch * settings.microbatch_rows
        loss = learner.loss(rows(first, settings.microbatch_rows), step, microbatch)
        if number == share - 1:  # its backward pass moves the logits: not after a loss of NaN
            metrics = learner.finish_step(step)
        engine.backward(loss, step, rate, number, share)
    return metrics
