"""The winner of a search again, from several seeds and on text that was not searched on, beside what it would replace.

The best of many trials is in part the luckiest one. Data order, prior, first logits and noise follow the seed here, so
that the differences between seeds hold all of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pipeline.config import EvaluateConfig, RunConfig
from pipeline.execution.executor import Flow
from pipeline.execution.plan import make_plan
from pipeline.execution.progress import Console
from pipeline.stages.evaluate import TextPerplexity
from pipeline.tracking.tracker import Run
from pipeline.tuning import space

SEEDS = (0, 1, 2)
#: Two-sided 95 % quantile of Student's t distribution with len(SEEDS) − 1 = 2 degrees of freedom.
T_QUANTILE = 4.303

WINNER = "winner"


@dataclass(frozen=True)
class Comparison:
    """The winner against other settings on one text, seed by seed."""

    other: str
    text: str
    nll: dict[str, list[float]]
    """Nats a token of the winner and of ``other``, in the order of the seeds."""

    @property
    def gains(self) -> list[float]:
        """Nats a token that the winner is better by, in the order of the seeds."""
        return [b - a for a, b in zip(self.nll[WINNER], self.nll[self.other], strict=True)]

    @property
    def gain(self) -> float:
        """Mean of the gains."""
        return fmean(self.gains)

    @property
    def spread(self) -> float:
        """Half of the width of the 95 % interval of the gain, from its differences between seeds (paired t)."""
        return T_QUANTILE * stdev(self.gains) / math.sqrt(len(self.gains))

    @property
    def larger(self) -> bool:
        """Whether the gain is larger than the spread."""
        return self.gain > self.spread

    def sentence(self) -> str:
        """The verdict."""
        a, b = (math.exp(fmean(self.nll[name])) for name in (WINNER, self.other))
        than = "larger than" if self.larger else "not larger than"
        return (
            f"{self.text}: perplexity {a:.2f} with the winner's settings, {b:.2f} with the {self.other} ones; the gain "
            f"of {self.gain:.4f} nats a token is {than} the spread over {len(self.gains)} seeds, ± {self.spread:.4f}."
        )


def confirm_config(
    config: RunConfig, learn: str, sparsity: float, contenders: Mapping[str, Mapping[str, Any]], seed: int
) -> RunConfig:
    """The recipe of one seed: learn with the settings of every contender and measure perplexity, nothing else."""
    entries = {name: space.place(config, learn, {**values, "seed": seed}) for name, values in contenders.items()}
    return config.model_copy(
        update={
            "seed": seed,
            "sparsities": [sparsity],
            "learn": entries,
            "prior": config.prior.model_copy(update={"methods": []}),
            "evaluate": EvaluateConfig(batch_rows=config.evaluate.batch_rows, samples=None),
            "benchmark": None,
        }
    )


def confirm(
    config: RunConfig,
    learn: str,
    sparsity: float,
    contenders: Mapping[str, Mapping[str, Any]],
    console: Console,
    run: Run,
) -> list[Comparison]:
    """Learn and measure every contender with every seed; what is finished is not done again.

    Args:
        contenders: values of the settings by name; one of them is the winner's.

    Returns:
        A comparison of the winner with each other contender on each evaluation text.
    """
    nll: dict[str, dict[str, list[float]]] = {}
    for seed in SEEDS:
        console.say(f"seed {seed}: {', '.join(contenders)}")
        plan = make_plan(confirm_config(config, learn, sparsity, contenders, seed))
        with run.child(f"confirm-seed-{seed}", {"stage": "confirm", "seed": str(seed)}) as child:
            Flow(plan, console, child).execute()
            for cell in plan.of(TextPerplexity):
                if cell.variant.method in contenders:
                    found = cell.read()["nll"]
                    nll.setdefault(cell.subject, {}).setdefault(cell.variant.method, []).append(found)
                    child.log_metrics({f"nll.{cell.variant.method}.{cell.subject}": found})
    return [Comparison(other, text, by) for text, by in nll.items() for other in contenders if other != WINNER]
