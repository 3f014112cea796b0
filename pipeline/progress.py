"""What a running pipeline tells: lines on the terminal and in ``run.log``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import ray


@ray.remote(num_cpus=0)
class Board:
    """Takes events from training workers until the driver fetches them. ``run`` in an event says whose it is."""

    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._errors: dict[str, str] = {}

    def push(self, event: dict[str, Any]) -> None:
        """Add an event."""
        self._events.append(event)
        if "error" in event:
            self._errors[event["run"]] = event["error"]

    def error(self, run: str) -> str | None:
        """Why a run stopped, where it was not for its workers' sake."""
        return self._errors.get(run)

    def drain(self) -> list[dict[str, Any]]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events


class Console:
    """Prints to the terminal and appends to a log that can be read afterwards."""

    def __init__(self, log: Path, quiet: bool = False) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a")
        self._quiet = quiet
        self._began = time.time()
        self._live = 0

    def say(self, text: str) -> None:
        """A line that stays."""
        minutes, seconds = divmod(int(time.time() - self._began), 60)
        stamped = f"[{minutes:3d}:{seconds:02d}] {text}"
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}", file=self._log, flush=True)
        if not self._quiet:
            self._wipe()
            print(stamped, flush=True)

    def warn(self, text: str) -> None:
        """A line that stays, on standard error, also in quiet mode."""
        print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} WARNING {text}", file=self._log, flush=True)
        self._wipe()
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def live(self, text: str) -> None:
        """A line that the next one replaces; on a terminal only."""
        if not self._quiet and sys.stdout.isatty():
            self._wipe()
            print(text, end="", flush=True)
            self._live = len(text)

    def _wipe(self) -> None:
        if self._live:
            print("\r" + " " * self._live + "\r", end="")
            self._live = 0


class TrainingProgress:
    """Turns the events of one training run into lines: rate, time left, loss, density, held-out loss of the masks."""

    def __init__(self, console: Console, name: str, steps: int, tokens_per_step: int, density: float) -> None:
        self._console, self._name, self._steps = console, name, steps
        self._tokens, self._density = tokens_per_step, density
        self._seconds: list[float] = []
        self._said = 0.0

    def show(self, event: dict[str, Any]) -> None:
        """Show one step."""
        step = int(event["step"]) + 1
        self._seconds = [*self._seconds[-19:], event["seconds"]]
        pace = sum(self._seconds) / len(self._seconds)
        left = int(pace * (self._steps - step))
        text = (
            f"{self._name}  step {step}/{self._steps}  loss {event['loss']:.3f}  lm {event['lm_loss']:.3f}  "
            f"density {event['density']:.3f} (target {self._density:.2f})  {self._tokens / pace:.0f} tokens/s  "
            f"{left // 60}:{left % 60:02d} left"
        )
        if "mask_loss.hard" in event:
            text += "  held-out: " + " ".join(
                f"{mode} {event[f'mask_loss.{mode}']:.3f}" for mode in ("sampled", "mean", "hard")
            )
        # Without a terminal a line every ten seconds is enough for a log.
        if "mask_loss.hard" in event or (not sys.stdout.isatty() and time.time() - self._said > 10):
            self._said = time.time()
            self._console.say(text)
        else:
            self._console.live(text)
