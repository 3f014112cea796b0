"""What the settings of a family of masks say beyond its own fields. Torch is not needed to read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from leap.gates import Gate


class MaskFamily(ABC):
    """Settings of one family: a frozen dataclass with a field ``kind`` that no other has.

    What others need to know of a family, they ask here: nobody compares ``kind``.
    """

    kind: str

    @property
    def fixed_density(self) -> bool:
        """Whether every soft mask has the density of the hard one, so that none has to be controlled."""
        return False

    @property
    def shares_sparsity(self) -> bool:
        """Whether sparsity moves between matrices; if not, each has the same."""
        return True

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m) where masks keep n of every m consecutive inputs."""
        return None

    @property
    def scope_name(self) -> str:
        """Within what the sparsity is exact, for tables."""
        return "{}:{}".format(*self.pattern) if self.pattern else "global"

    @property
    def pattern_name(self) -> str:
        """What is removed, for the mask file."""
        return "{}:{}".format(*self.pattern) if self.pattern else "unstructured"

    @abstractmethod
    def gate(self) -> Gate:
        """The gate that makes masks by these settings."""

    @classmethod
    def published(cls) -> dict[str, Any]:
        """The fields of :class:`leap.LearnSettings` as the family was published.

        Raises:
            ValueError: it was not.
        """
        raise ValueError(f"the family {cls.kind} has no published settings")


def check_pattern(pattern: tuple[int, int]) -> None:
    """Check that a pattern keeps some and removes some of a group.

    Raises:
        ValueError: it does not.
    """
    keep, group = pattern
    if not 1 <= keep < group:
        raise ValueError(f"pattern must be [N, M] with 1 <= N < M, not {[*pattern]}")


class TaggedByKind:
    """Annotation of a union of families, for who reads settings from a file with pydantic: ``kind`` chooses."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """The schema that looks at ``kind`` first, so that errors are those of the family that is meant."""
        from pydantic_core import core_schema

        members = get_args(source) or (source,)
        return core_schema.tagged_union_schema({m.kind: handler.generate_schema(m) for m in members}, "kind")
