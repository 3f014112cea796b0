"""What a learning run measures step by step, on its way to the tracker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.tracking.tracker import Run


class Curves:
    """Records each step of a run once, whoever tells of it.

    A worker tells of a step when it has done it, and does it again when it was killed before its next checkpoint. A
    checkpoint tells of all steps up to it, also of those that a killed process did not live to record.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._known = set(range(run.last_step + 1))

    def add(self, event: Mapping[str, Any]) -> None:
        """Record one step: ``step``, its measurements and perhaps ``run``, whose it is."""
        step = int(event["step"])
        if step not in self._known:
            self._known.add(step)
            self._run.log_metrics({name: event[name] for name in _measured(event)}, step)

    def fill(self, history: Iterable[Mapping[str, Any]]) -> None:
        """Record what is missing, a curve at a time."""
        missing = [event for event in history if int(event["step"]) not in self._known]
        # Some things are measured at each step, some now and then.
        for names in dict.fromkeys(_measured(event) for event in missing):
            events = [event for event in missing if _measured(event) == names]
            curves = {name: [float(event[name]) for event in events] for name in names}
            self._run.log_series([int(event["step"]) for event in events], curves)
        self._known |= {int(event["step"]) for event in missing}


def _measured(event: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in event if name not in ("step", "run"))
