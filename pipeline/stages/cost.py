"""What a piece of work takes: bytes, and seconds by counting operations.

Shapes of the counts: N weights of linear layers, T tokens. A forward pass is 2·N·T floating-point operations, the
gradient of the activations as much again, and that of the masked weights 2·T for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Operations a second of one GPU: what the published runs come to, 6·N·T over their GPU-hours, 0.8 to 1.5e14 on H100s.
GPU_SPEED = 1.2e14
#: Bytes a second that a plain read takes from memory: seen with one thread on a server CPU; an H100's data sheet.
CPU_MEMORY, GPU_MEMORY = 1.2e10, 3e12


@dataclass(frozen=True)
class Machine:
    """What the work is done on."""

    cpu: float
    """Operations a second that one CPU reaches in training."""
    gpus: bool
    """Whether tasks get a GPU each."""

    @property
    def speed(self) -> float:
        """Operations a second of one task."""
        return GPU_SPEED if self.gpus else self.cpu

    @property
    def memory_speed(self) -> float:
        """Bytes a second that one task reads."""
        return GPU_MEMORY if self.gpus else CPU_MEMORY


@dataclass(frozen=True)
class Cost:
    """What is not known is none."""

    seconds: float | None = None
    disk: float | None = None
    """Bytes at most, while the work is done or after."""
    memory: Mapping[str, float] = field(default_factory=dict)
    """Bytes of one worker by what they are for. What an allocator keeps beyond that is not counted."""
