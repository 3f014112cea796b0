"""Every Triton kernel, compiled for every target without a GPU: gates read from the machine code."""

import pytest

triton = pytest.importorskip("triton")

from leap_kernels import aot  # noqa: E402
from leap_kernels.aot import TARGETS, VARIANTS, Code, broken_gates  # noqa: E402


@pytest.fixture(scope="module")
def table():
    kernels = aot.recorded()
    if kernels is None:
        pytest.skip(f"no record of Triton {triton.__version__}: python -m leap_kernels.aot --record")
    return kernels


def test_table_is_complete(table):
    assert {name: set(codes) for name, codes in table.items()} == {name: set(TARGETS) for name in VARIANTS}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_code(variant, target, table):
    code = aot.read(variant, target)
    assert broken_gates(VARIANTS[variant], TARGETS[target], code, table[variant][target]) == []


def test_gates_break():
    variant, target = VARIANTS["gemv_idx8 x1 8 warps"], TARGETS["sm_90"]
    good = Code(registers=64, spills=0, vector_loads=4, instructions_per_weight=4.0)
    assert broken_gates(variant, target, good, good) == []
    bad = Code(registers=200, spills=1, vector_loads=2, instructions_per_weight=4.5)
    assert len(broken_gates(variant, target, bad, good)) == 4
    faster = Code(registers=64, spills=0, vector_loads=4, instructions_per_weight=3.5)
    assert broken_gates(variant, target, faster, good) == ["3.5 instructions per weight, 4.0 recorded"]


def test_bitmaps_are_counted_in_hardware():
    """The compiler recognises the population count written out in shifts and masks."""
    compiled = aot.compile_variant(VARIANTS["gemv_bitmap bfloat16 4 warps"], TARGETS["sm_90"])
    assert "popc.b32" in compiled.asm["ptx"]
