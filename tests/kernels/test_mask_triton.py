"""The Triton mask kernels without a GPU: interpreted against float64, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from leap_kernels.mask_backward_triton import mask_backward_kernel  # noqa: E402
from leap_kernels.mask_forward_triton import mask_forward_kernel  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402


def test_interpreted_kernels_match_float64():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).parent / "interpreted_mask_kernels.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


FORWARD = (mask_forward_kernel, ["weight_ptr", "logits_ptr", "out_ptr", "partial_ptr"])
BACKWARD = (mask_backward_kernel, ["grad_ptr", "weight_ptr", "logits_ptr", "stats_grad_ptr", "out_ptr"])
SCALARS = {"count": "i64", "first_block": "i64", "skip": "i32", "seed": "i64", "layer": "i32", "step": "i32"}
SCALARS |= {"scale": "fp32", "inverse_temperature": "fp32"}


@pytest.mark.parametrize(("kernel", "pointers"), [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("target", "fast_math"), [(GPUTarget("cuda", 90, 32), True), (GPUTarget("hip", "gfx942", 64), False)], ids=str
)
def test_compiles_ahead_of_time(kernel, pointers, target, fast_math):
    constants = {"NOISE": True, "FAST_MATH": fast_math, "BLOCK": 1024}
    signature = {**dict.fromkeys(pointers, "*fp32"), **SCALARS, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "count", "skip"]}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True})
    if target.backend == "cuda":
        # Four weights per access, and no shuffling of the noise through shared memory in front of it.
        assert "ld.global.v4" in compiled.asm["ptx"]
        assert "st.global.v4" in compiled.asm["ptx"]
