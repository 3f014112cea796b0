"""What every piece of work is: its inputs, and what follows from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from pipeline.artifacts.store import StageDir, fingerprint
from pipeline.config import ModelConfig
from pipeline.model.sizes import Sizes
from pipeline.stages.cost import Cost, Machine
from pipeline.tracking.tracker import Run

Result = TypeVar("Result")


class Place(Enum):
    """Where a piece of work is done."""

    DRIVER = auto()
    """In the driver, one after the other; it starts tasks of its own."""
    TASK = auto()
    """In a Ray task of one CPU, or of one GPU if learning has any; side by side with others."""
    NODE = auto()
    """In a Ray task with all CPUs of a node, one after the other: nothing runs beside it."""
    TRAINING = auto()
    """By the workers of a learning run, side by side as far as the CPUs go."""


@dataclass(frozen=True)
class PinnedModel:
    """A model as the recipe names it, and what its files hold."""

    config: ModelConfig
    identity: str
    """Hash of the files."""

    @property
    def key(self) -> list[str]:
        """What results depend on. Where the files lie is not in it."""
        return [self.identity, self.config.dtype]


@dataclass(frozen=True)
class Remarks:
    """What is told of work that has just been done."""

    lines: Sequence[str] = ()
    warnings: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Stage(ABC, Generic[Result]):
    """One piece of work. Its fields are its inputs: sections of the recipe, and other pieces of work.

    Picklable. Two are the same work where their directories are the same.
    """

    KIND: ClassVar[str]
    """Folder of the results; with ``item`` the name of the work."""
    VERSION: ClassVar[int]
    """Of the code: another one makes the work necessary again."""
    PHASE: ClassVar[str]
    """What a run shows progress of. Phases follow each other; within one, work depends on earlier phases alone, or,
    where it is not done in the driver, on what is done there."""
    PLACE: ClassVar[Place] = Place.TASK

    store: str
    """URI below which the results of the run lie; in no key."""

    @property
    @abstractmethod
    def item(self) -> str:
        """What tells it from others of its kind; may be empty."""

    @abstractmethod
    def inputs(self) -> list[object]:
        """All that decides the result, as :func:`fingerprint` takes it. Settings that change no result are left out."""

    @abstractmethod
    def run(self) -> None:
        """Do the work and write its directory.

        Raises:
            UserError: something the user gave does not work.
        """

    @abstractmethod
    def read(self) -> Result:
        """What finished work holds.

        Raises:
            DamagedError: a file is not what was written.
        """

    def cost(self, sizes: Sizes, machine: Machine) -> Cost:  # noqa: ARG002 - for those that override it
        """What the work takes, from sizes and settings alone."""
        return Cost()

    def remarks(self) -> Remarks:
        """What to tell of work that has just been done."""
        return Remarks()

    def record(self, run: Run) -> None:
        """Tell the tracker's run of the whole pipeline what finished work holds."""

    @cached_property
    def directory(self) -> StageDir:
        """Where the result lies."""
        key = fingerprint(self.KIND, self.item, self.VERSION, *self.inputs())
        return StageDir(self.store, self.KIND, self.item, key)

    @property
    def key(self) -> str:
        """Fingerprint of the inputs, the settings and the version of the code."""
        return self.directory.key

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def label(self) -> str:
        """What a plan shows: neighbours of one kind with the same label are one line."""
        return self.item

    @property
    def facts(self) -> dict[str, Any]:
        """The manifest of finished work; empty before."""
        return self.directory.manifest() or {}

    @property
    def finished(self) -> bool:
        return self.directory.manifest() is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.directory == other.directory

    def __hash__(self) -> int:
        return hash(self.directory)
