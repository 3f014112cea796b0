"""What is known of each trial, in a file of the search's directory: it outlives the process, ended or killed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.storage import write_atomically
from pipeline.tracking.values import jsonable

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass
class Record:
    """One trial."""

    number: int
    id: str
    """Tune's name of the trial."""
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
        self._began = time.time() - known["seconds"]

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
        # Tune writes its state down every few seconds: what it began after that is begun anew, by another id.
        if known is None or known.id != id:
            known = self._trials[number] = Record(number, id, dict(values))
        known.status, known.error = "running", None
        return known

    def save(self) -> None:
        """Write all of them."""
        content = {"seconds": self.seconds, "trials": [asdict(trial) for trial in self]}
        write_atomically(self._file, json.dumps(jsonable(content), indent=1))
