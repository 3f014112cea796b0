"""What the launchers of the Triton kernels share."""

from collections.abc import Sequence
from typing import Any

import triton
from triton import knobs


def configurations(choices: Sequence[tuple[dict[str, Any], int]]) -> list[triton.Config]:
    """Autotuning configurations from (constexpr arguments, warps), of which the interpreter gets only the first.

    The interpreter cannot time them, and fails on more than one.
    """
    kept = choices[:1] if knobs.runtime.interpret else choices
    return [triton.Config(constants, num_warps=warps) for constants, warps in kept]
