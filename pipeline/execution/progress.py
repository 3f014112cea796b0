"""What a running pipeline tells: lines and bars on the terminal, or JSON lines, and ``run.log`` in any case."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from pipeline.tracking.redaction import redact
from pipeline.tracking.values import jsonable

Mode = Literal["bars", "lines", "json", "quiet"]
LINE_EVERY = 10.0
"""Seconds between the lines that stand for a bar where there is no terminal."""


def mode_for(quiet: bool, json_lines: bool) -> Mode:
    """How to tell it: as asked for, else bars on a terminal and lines in a log."""
    if json_lines:
        return "json"
    if quiet:
        return "quiet"
    return "bars" if sys.stdout.isatty() else "lines"


class Console:
    """Tells what happens, in one of four ways, and appends it to a log that can be read afterwards.

    ``bars`` and ``lines`` are for people; ``quiet`` leaves warnings; ``json`` prints one object a line with ``time``,
    ``event`` (message, warning, stage, progress, result) and what belongs to it. Secrets are left out of all of it.
    """

    def __init__(self, log: Path, mode: Mode) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.mode = mode
        self._log = log.open("a")
        self._began = time.time()
        self._lines: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bars: Progress | None = None
        self._is_log_lost = False
        self.warnings: list[str] = []
        if mode == "bars":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bars = Progress(*columns, console=RichConsole(), transient=True, refresh_per_second=4)
            self._bars.start()

    def say(self, text: str, event: str = "message", **facts: Any) -> None:
        """A line that stays."""
        text = redact(text)
        self._write(text)
        minutes, seconds = divmod(int(time.time() - self._began), 60)
        stamped = f"[{minutes:3d}:{seconds:02d}] {text}"
        if self.mode == "json":
            self.emit(event, text=text, **facts)
        elif self._bars:
            self._bars.console.print(Text(stamped), soft_wrap=True)
        elif self.mode == "lines":
            print(stamped, flush=True)

    def warn(self, text: str) -> None:
        """A line that stays, on standard error, also in quiet mode; the same is said once."""
        text = redact(text)
        if text in self.warnings:
            return
        self.warnings.append(text)
        self._write(f"WARNING {text}")
        if self.mode == "json":
            self.emit("warning", text=text)
        elif self._bars:
            self._bars.console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)
        else:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The time of a stage; bars that it showed end with it."""
        began = time.time()
        if self.mode == "json":
            self.emit("stage", stage=name, state="started")
        yield
        seconds = round(time.time() - began, 1)
        for task in self._tasks.values():
            assert self._bars is not None
            self._bars.remove_task(task)
        self._tasks.clear()
        self.say(f"{name} done in {seconds} s", "stage", stage=name, state="finished", seconds=seconds)

    def progress(self, name: str, done: int, total: int, text: str, notable: bool = False, **facts: Any) -> None:
        """How far something is: a bar, or a line now and then, always where it is ``notable``."""
        if self.mode == "json":
            self.emit("progress", name=name, done=done, total=total, **facts)
        if self._bars:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=total, text="")
            self._bars.update(self._tasks[name], completed=done, total=total, text=text)
        line = f"  {name} {done}/{total}  {text}"
        if notable or (self.mode != "bars" and time.time() - self._lines.get(name, self._began) > LINE_EVERY):
            self._lines[name] = time.time()
            if self.mode == "json":
                self._write(line)
            else:
                self.say(line)

    def forget(self, name: str) -> None:
        """Take away the bar of what has ended before its stage."""
        if self._bars and name in self._tasks:
            self._bars.remove_task(self._tasks.pop(name))

    def emit(self, event: str, **facts: Any) -> None:
        """Print one JSON line."""
        print(
            json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **redact(jsonable(facts))}),
            flush=True,
        )

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()
        if error is not None:
            self._write(f"ended: {type(error).__name__}: {error}")
        with suppress(OSError):  # what could not be written before
            self._log.close()

    def _write(self, text: str) -> None:
        try:
            print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {redact(text)}", file=self._log, flush=True)
        except OSError as error:
            if not self._is_log_lost:
                self._is_log_lost = True
                print(f"warning: {self._log.name} cannot be written ({error})", file=sys.stderr, flush=True)


class TrainingProgress:
    """Turns the events of one training run into progress: rate, time left, loss, density, loss of the hard mask."""

    def __init__(self, console: Console, name: str, steps: int, tokens_per_step: int, density: float) -> None:
        self._console, self._name, self._steps = console, name, steps
        self._tokens, self._density = tokens_per_step, density
        self._seconds: list[float] = []
        self._hard = ""

    def show(self, event: dict[str, Any]) -> None:
        """Show one step."""
        step = int(event["step"]) + 1
        self._seconds = [*self._seconds[-19:], event["seconds"]]
        pace = sum(self._seconds) / len(self._seconds)
        left = int(pace * (self._steps - step))
        target = event.get("target_density", self._density)
        watched = "mask_loss.hard" in event
        if watched:
            self._hard = f"  hard mask {event['mask_loss.hard']:.3f}"
        text = (
            f"loss {event['loss']:.3f}  lm {event['lm_loss']:.3f}{self._hard}  density {event['density']:.3f} "
            f"(target {target:.2f})  {self._tokens / pace:.0f} tokens/s  {left // 60}:{left % 60:02d} left"
        )
        facts = {key: value for key, value in event.items() if key != "step"}
        facts |= {"target_density": target, "tokens_per_second": self._tokens / pace, "seconds_left": left}
        self._console.progress(self._name, step, self._steps, text, watched, **facts)
