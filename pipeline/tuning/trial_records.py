"""What is known of each trial, in a file of the search's directory: it outlives the process, ended or killed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.artifacts.store import write_atomically
from pipeline.tracking.values import jsonable

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Record:
    """One trial."""

    number: int
    id: str
    """Tune's name of the trial, another one each time that the search is started."""
    values: dict[str, Any]
    status: Status = "running"
    """``stopped``: early, because others were better."""
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Held-out loss of the hard mask in nats a token, at ``steps`` (counted from 0)."""
    tokens: int = 0
    """Tokens learned from."""
    sparsity: float = 0.0
    start_up: float | None = None
    """Seconds before the first step: starting workers, loading the model."""
    seconds: float = 0.0
    ended: float = 0.0
    """Seconds of search until the end of the trial, without the time between a kill and a restart."""
    error: str | None = None

    @property
    def loss(self) -> float | None:
        """The last loss that was measured."""
        return self.losses[-1] if self.losses else None

    @property
    def perplexity(self) -> float | None:
        """Of the last loss; of one that no float can hold, infinity."""
        return None if self.loss is None else math.exp(self.loss) if self.loss < 700 else math.inf

    def report(self, step: int, loss: float) -> None:
        """Add a measurement; a trial that was continued repeats the first ones."""
        if not self.steps or step > self.steps[-1]:
            self.steps.append(step)
            self.losses.append(loss)

    def at(self, step: int) -> float:
        """The loss at ``step``, where there was a measurement."""
        return self.losses[self.steps.index(step)]


class Records:
    """The trials of a search in the order that they were proposed in.

    Args:
        file: read if it is there; written at each change.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"seconds": 0.0, "trials": []}
        self._trials = {trial["number"]: Record(**trial) for trial in known["trials"]}
        self._began: float = time.time() - known["seconds"]

    def __iter__(self) -> Iterator[Record]:
        return iter(sorted(self._trials.values(), key=lambda trial: trial.number))

    def __len__(self) -> int:
        return len(self._trials)

    @property
    def seconds(self) -> float:
        """Seconds of search up to now."""
        return time.time() - self._began

    def open(self, number: int, id: str, values: Mapping[str, Any]) -> Record:
        """The record of a trial that starts, perhaps again."""
        known = self._trials.get(number)
        if known is None or known.values != values:
            known = self._trials[number] = Record(number, id, dict(values))
        known.id, known.status, known.error = id, "running", None
        return known

    def numbers(self, trials: int) -> list[int]:
        """The numbers of the trials that are still to run, of ``trials`` in all: first of those that were begun."""
        begun = [trial.number for trial in self.unended]
        return begun + [number for number in range(1, trials + 1) if number not in self._trials]

    @property
    def unended(self) -> list[Record]:
        """The trials that an earlier process began and did not end."""
        return [trial for trial in self if trial.status == "running"]

    def save(self) -> None:
        """Write all of them."""
        content = {"seconds": self.seconds, "trials": [asdict(trial) for trial in self]}
        write_atomically(self._file, json.dumps(jsonable(content), indent=1))
