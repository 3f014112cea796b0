"""A run of checks and measurements under a budget: one JSON line for each result, written as soon as it exists."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
LOST = "lost"
"""Name of the record of a step that an error ended."""


class Records:
    """Appends to a file of JSON lines, and to the terminal; a line is on the disk before the next thing starts."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        rounded = {key: _rounded(value) for key, value in record.items()}
        self._file.write(json.dumps(rounded) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        print(" ".join(f"{value}" if key in ("step", "name") else f"{key}={value}" for key, value in rounded.items()))


@dataclass
class CheckRun:
    """What a step of the check is given, and where it leaves its results."""

    device: torch.device
    smoke: bool
    """Small shapes and few repeats: whether everything runs, not how fast."""
    records: Records
    step: str
    until: float
    """``time.monotonic()`` at which the step's share of the budget ends."""
    failed: list[str] = field(default_factory=list)
    """Names of the checks that failed."""

    def figure(self, name: str, **values: Any) -> None:
        """Record something measured."""
        self.records.write({"step": self.step, "name": name, **values})

    def check(self, name: str, passed: bool, **values: Any) -> None:
        """Record a statement that has to be true."""
        if not passed:
            self.failed.append(f"{self.step}: {name}")
        self.records.write({"step": self.step, "name": name, "passed": bool(passed), **values})

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Record an error of what is inside as a failed check, and go on; only a dead CUDA context ends the step."""
        try:
            yield
        except Exception as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                torch.cuda.empty_cache()
            elif self.device.type == "cuda":
                torch.cuda.synchronize()  # raises again if the context is lost
            self.check(name, False, error=f"{type(error).__name__}: {error}"[:600])

    def affordable(self, items: Sequence[T], label: Callable[[T], str] = str) -> Iterator[T]:
        """The items in order for as long as the step's time lasts; those left out are recorded."""
        for number, item in enumerate(items):
            if time.monotonic() > self.until:
                self.figure("left out, the step's time is over", items=[label(i) for i in items[number:]])
                return
            yield item

    def pick(self, real: T, smoke: T) -> T:
        """The size for a card, or for a smoke run."""
        return smoke if self.smoke else real


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64; infinite where a value is missing or not finite."""
    difference = (found.double() - exact.double()).norm()
    error = float(difference / exact.double().norm().clamp_min(1e-300))
    return error if math.isfinite(error) else math.inf


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are full of NaN, so that an element that nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value
