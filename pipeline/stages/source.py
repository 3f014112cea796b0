"""What masks come from, and how what is made of them is named."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from leap.export import Pruned
from pipeline.stages.origin import Origin
from pipeline.stages.stage import Result, Stage

if TYPE_CHECKING:
    from pipeline.stages.learn import Learn


@dataclass(frozen=True, eq=False)
class MaskSource(Stage[Result]):
    """Work whose result is a mask, or has one at each of several sparsities."""

    ORIGIN: ClassVar[Origin]

    @property
    @abstractmethod
    def scope(self) -> str:
        """Within what the sparsity is exact: ``global``, ``layer``, ``row``, ``block`` or a pattern as ``2:4``."""

    @property
    @abstractmethod
    def pattern(self) -> str:
        """What is removed, for the mask file: ``unstructured``, ``2:4``, say."""

    @property
    def learned(self) -> Learn | None:
        """The learning run that the mask comes from, if it was learned."""
        return None

    @abstractmethod
    def pruned(self, linears: Mapping[str, nn.Linear], sparsity: float) -> tuple[Pruned, bool]:
        """Exact masks and new weights of finished work, and whether there are any new weights.

        Args:
            linears: the layers of the dense model by name, in model order.
        """

    @abstractmethod
    def seconds(self) -> float:
        """Time to make the mask, with all that it was made from but a prior, to a tenth."""


def variant_name(method: str, seed: int | None, sparsity: float | None) -> str:
    """Name of a variant and of the work that makes it: ``leap@0.5``, ``leap.seed1@0.5``. A method's has no dot."""
    return f"{method}{'' if seed is None else f'.seed{seed}'}{'' if sparsity is None else f'@{sparsity:g}'}"
