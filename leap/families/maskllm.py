"""Settings of MaskLLM's masks (arXiv 2409.17481)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from leap.families.base import MaskFamily, check_pattern
from leap.schedules import Schedule
from leap.validation import NO_UNKNOWN_KEYS

if TYPE_CHECKING:
    from leap.families.candidates import CandidateGate


@dataclass(frozen=True, kw_only=True)
class MaskLLM(MaskFamily):
    """A logit for each way to keep N of M consecutive inputs, drawn from by Gumbel-softmax.

    The defaults are the published values.

    Raises:
        ValueError: a value out of its range; the message names the field.
    """

    __pydantic_config__ = NO_UNKNOWN_KEYS

    kind: Literal["maskllm"] = "maskllm"
    """``maskllm``: a logit for each way to keep N of M consecutive inputs, drawn from by Gumbel-softmax."""
    pattern: tuple[int, int] = (2, 4)
    """N:M, as in ``[2, 4]``, which has six logits a group; ``[4, 8]`` has 70."""
    noise: bool = True
    """Gumbel noise on the logits; without it the mask is the same in every micro-batch."""
    temperature: Schedule = field(default_factory=lambda: Schedule(start=4.0, end=0.05))
    """Temperature τ of the softmax."""
    scale: Schedule = field(default_factory=lambda: Schedule(start=100.0, end=500.0))
    """Scale κ of the logits."""
    strength: float = 3.0
    """How far the prior's pattern starts above the average one, in standard deviations of the first logits."""
    init_std: float = 0.01
    """Standard deviation of the Gaussian that the first logits are drawn from."""

    def __post_init__(self) -> None:
        check_pattern(self.pattern)
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be finite and not negative, not {self.strength}")
        if not 0 < self.init_std < math.inf:
            raise ValueError(f"init_std must be positive and finite, not {self.init_std}")

    @property
    def fixed_density(self) -> bool:
        """See :attr:`MaskFamily.fixed_density`."""
        return True

    @property
    def shares_sparsity(self) -> bool:
        """See :attr:`MaskFamily.shares_sparsity`."""
        return False

    def gate(self) -> CandidateGate:
        """See :meth:`MaskFamily.gate`."""
        from leap.families.candidates import CandidateGate

        return CandidateGate(self)

    @classmethod
    def published(cls) -> dict[str, Any]:
        """MaskLLM's published values; they want their 2000 steps of 256 rows of 4096 tokens.

        The authors also decay logits by 0.1, which takes 5e-5 of a logit a step, and have 1e-5 for Adam's ε. Here
        nothing is decayed, and ε is smaller.
        """
        return {
            "family": cls(
                pattern=(2, 4),
                noise=True,
                temperature=Schedule(start=4.0, end=0.05),
                scale=Schedule(start=100.0, end=500.0),
                strength=3.0,
                init_std=0.01,
            ),
            "steps": 2000,
            "batch_rows": 256,
            "microbatch_rows": 1,
            "prior": "sparsegpt",
            "prior_scope": "row",
            "optimiser": "adam",
            "learning_rate": 5e-4,
            "matrix_rate": 0.0,
            "warmup_steps": 0,
            "final_rate": 0.1,
            "betas": (0.9, 0.95),
            "clip": 1.0,
            "weight_reward": 1e-5,
            "distillation": 0.0,
        }
