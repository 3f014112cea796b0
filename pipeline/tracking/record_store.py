"""What a store of records is: where a journal is delivered to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pipeline.config import TrackingConfig


class Store(ABC):
    """Takes the records of one journal. Failures are raised, see :class:`pipeline.tracking.outbox.Outbox`."""

    @classmethod
    @abstractmethod
    def check(cls, settings: TrackingConfig, runs: Path) -> None:
        """Look for what can be known to go wrong before a run.

        Args:
            runs: the directory of all runs, on this machine.

        Raises:
            UserError: the store cannot be what the settings say.
        """

    @classmethod
    @abstractmethod
    def of_run(cls, settings: TrackingConfig, runs: Path, folder: Path) -> Self:
        """The store of a run that begins or continues.

        Args:
            folder: of the journal. What the store has to remember of it lies there.
        """

    @classmethod
    @abstractmethod
    def known_to(cls, folder: Path) -> Iterator[Self]:
        """The stores of this kind that the journal in ``folder`` was tracked with."""

    @abstractmethod
    def apply(self, record: dict[str, Any], folder: Path) -> None:
        """Take a record of a journal in ``folder``; taking it again changes nothing."""

    @abstractmethod
    def alive(self) -> bool:
        """Whether records can be delivered; asked after one could not be."""

    @abstractmethod
    def info(self) -> dict[str, str]:
        """Where the records can be looked at: ``uri``, ``run_id``, ``ui_command``, as far as there are any."""

    @property
    @abstractmethod
    def delivered(self) -> int:
        """The byte of the journal that delivery has come to, also that of an earlier process."""

    @abstractmethod
    def acknowledge(self, end: int) -> None:
        """Remember that all records up to the byte ``end`` of the journal are delivered."""
