"""Where training workers tell of what happens, and the driver hears of it."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class Board:
    """Takes events from training workers until the driver fetches them. ``run`` in an event says whose it is.

    Made by :func:`start_board`.
    """

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._errors: dict[str, str] = {}
        self._measured: dict[str, list[dict[str, Any]]] = {}

    def push(self, event: dict[str, Any]) -> None:
        """Add an event."""
        self._events.append(event)
        if "error" in event:
            self._errors[event["run"]] = event["error"]
        if "mask_loss.hard" in event:
            self._measured.setdefault(event["run"], []).append(event)

    def error(self, run: str) -> str | None:
        """Why a run stopped, where it was not for its workers' sake."""
        return self._errors.get(run)

    def measured(self, run: str, after: int) -> list[dict[str, Any]]:
        """The events of a run later than step ``after`` that have a loss on held-out rows, also those drained."""
        return [event for event in self._measured.get(run, []) if event["step"] > after]

    def drain(self) -> list[dict[str, Any]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events


def start_board() -> Any:
    """A handle of a new board, on the node of the caller."""
    return Board.options(scheduling_strategy=here()).remote()  # type: ignore[attr-defined]


def here() -> NodeAffinitySchedulingStrategy:
    """Places an actor or a task on the node of its caller.

    What waits for work elsewhere is lost with the caller alone, and not with any node of the cluster.
    """
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
