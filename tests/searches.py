"""A search that has ended, made up."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.config import recipe
from pipeline.tuning import outcome, space
from pipeline.tuning.charts import make_figures
from pipeline.tuning.confirm import Comparison
from pipeline.tuning.report import Summary
from pipeline.tuning.search import Cost, Options, make_search
from pipeline.tuning.trial_records import Record


def trial(number: int, loss: float, tokens: int = 100, sparsity: float = 0.5, **values: object) -> Record:
    values = {"learning_rate": 0.01, "family.noise": True} | values
    return Record(
        number,
        f"t{number}",
        values,
        "finished",
        [0, 3, 9],
        [loss + 2, loss + 1, loss],
        tokens,
        sparsity,
        ended=60.0 * number,
    )


def searched(against: Cost | None, directory: Path) -> tuple[Summary, dict[str, Figure]]:
    """A search of twelve trials and its figures."""
    config = recipe.load("nano")
    (directory / "s.yaml").write_text(
        "parameters: {learning_rate: {low: 1.0e-3, high: 0.1}, family.noise: [true, false]}\n"
    )
    found = space.load(str(directory / "s.yaml"), config, "leap")
    wanted = make_search(config, "leap", found, Options(against=against))
    extra = {"steps": 100} if against else {}
    trials = [
        trial(i, 3 + math.sin(i), tokens=100 * i, learning_rate=0.001 * i, **{"family.noise": i % 2 == 0}, **extra)
        for i in range(1, 13)
    ]
    trials[4].status, trials[4].error = "failed", "the loss is <nan> at step 3"
    trials[5].status = "stopped"
    best = outcome.front(trials, against) if against else outcome.finished(trials)[:1]
    comparison = Comparison("published", "docs", {"winner": [2.0, 2.1, 2.2], "published": [2.5, 2.6, 2.7]})
    reference = {"published": trials[0]}
    summary = Summary(config, "leap", 0.6, found, wanted, trials, reference, best, ["winner.yaml"], [comparison])
    return summary, make_figures(trials, wanted.domains, reference, against)
