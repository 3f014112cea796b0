"""The Triton bitmap GEMV without a GPU: interpreted against float64, and compiled ahead of time."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from leap_kernels import gemv_bitmap_triton  # noqa: E402
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


def test_interpreted_kernel_matches_float64():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parent / "interpreted_gemv.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def compile_for(target: GPUTarget):
    pointers = {"bits_ptr": "*i32", "off_ptr": "*i32", "row_base_ptr": "*i64", "vals_ptr": "*bf16", "x_ptr": "*fp32"}
    signature = {**pointers, "y_ptr": "*bf16", "rows": "i32", "groups": "i32", "x_columns": "i32"}
    constants = {
        "HAS_ROW_BASE": False,
        "BLOCK_ROWS": gemv_bitmap_triton._BLOCK_ROWS,
        "BLOCK_GROUPS": gemv_bitmap_triton._BLOCK_GROUPS,
    }
    signature |= dict.fromkeys(constants, "constexpr")
    names = list(signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "y_ptr", "x_columns"]}
    source = ASTSource(gemv_bitmap_triton.gemv_bitmap_kernel, signature, constexprs=constants, attrs=aligned)
    options = {"enable_fp_fusion": True, "num_warps": gemv_bitmap_triton._WARPS}
    return triton.compile(source, target=target, options=options)


def test_compiles_for_amd():
    compile_for(GPUTarget("hip", "gfx942", 64))


def test_instructions_per_weight():
    """The loop's length in sm_90 machine code is what bounds this kernel's speed; it must not grow unnoticed."""
    compiled = compile_for(GPUTarget("cuda", 90, 32))
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    lengths = []
    for address, operands in re.findall(r"/\*([0-9a-f]{4})\*/\s+(?:@!?U?P\w+ )?BRA\b([^;]*);", listing):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if target and int(target[1], 16) < int(address, 16):
            lengths.append((int(address, 16) - int(target[1], 16)) // 16 + 1)
    weights = (
        gemv_bitmap_triton._BLOCK_ROWS * gemv_bitmap_triton._BLOCK_GROUPS * 128 // (32 * gemv_bitmap_triton._WARPS)
    )
    assert "POPC" in listing
    assert max(lengths) / weights < 15
