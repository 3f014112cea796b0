"""The kernels that :mod:`leap_kernels.aot` compiles, with types and constants, and what their code must keep to."""

from dataclasses import dataclass, field
from typing import Any

import triton

from leap_kernels import (
    adam8bit_triton,
    add_stochastic_triton,
    gemv_bitmap_triton,
    gemv_idx8_triton,
    mask_backward_triton,
    mask_forward_triton,
    output_losses_triton,
    radix_counts_triton,
    spmm_bitmap_triton,
    unpack_bitmap_triton,
    unpack_idx8_triton,
)
from leap_kernels.idx8 import PANEL


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kernel as it is launched; the arguments in the order pointers, scalars, constants."""

    kernel: triton.JITFunction
    pointers: dict[str, str]
    """Triton's type of each."""
    scalars: dict[str, str]
    """Triton's type of each."""
    aligned: tuple[str, ...]
    """Scalars that 16 divides in ordinary use."""
    constants: dict[str, Any]
    backend_constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Constants that differ by backend ("cuda", "hip")."""
    warps: int
    weights: int
    """How many weights of the dense matrix a program handles in the counted code, sparse ones at half density; for the
    losses, how many logits of the student."""
    vector_loads: dict[str, int]
    """Loads of 16 bytes that a thread must at least make there, by backend."""
    max_registers: int
    """With 96 an SM of 65536 registers holds 21 warps, with 168 it holds 12."""


_MATRIX = {"bits_ptr": "*u32", "off_ptr": "*i32", "row_base_ptr": "*i64"}


def _gemv_bitmap(dtype: str, config: gemv_bitmap_triton.Config) -> Variant:
    groups = config.warps * config.groups_per_warp
    return Variant(
        kernel=gemv_bitmap_triton.gemv_bitmap_kernel,
        pointers={"x_ptr": dtype, **_MATRIX, "vals_ptr": dtype, "bias_ptr": dtype, "y_ptr": dtype},
        scalars={"rows": "i32", "columns": "i32", "groups": "i32"},
        aligned=("rows", "columns", "groups"),
        constants={
            "batch": 1,  # as a launch makes a constant of any size of 1
            "HAS_ROW_BASE": False,
            "HAS_BIAS": False,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_GROUPS": groups,
            "PREFETCH": config.prefetch,
        },
        warps=config.warps,
        weights=config.block_rows * groups * 128,
        # The words of a group for every row of the lane, and 8 columns of x.
        vector_loads={"cuda": config.block_rows + (1 if dtype == "*bf16" else 2), "hip": 2},
        max_registers=128,
    )


def _gemv_idx8(config: gemv_idx8_triton.Config, batch: int) -> Variant:
    chunks = config.warps * config.chunks_per_warp
    count = {"count": "i32"} if batch > 1 else {}
    return Variant(
        kernel=gemv_idx8_triton.gemv_idx8_kernel,
        pointers={
            "x_ptr": "*bf16",
            "start_ptr": "*i32",
            "base_ptr": "*u16",
            "index_ptr": "*u8",
            "vals_ptr": "*bf16",
            "bias_ptr": "*bf16",
            "y_ptr": "*bf16",
        },
        scalars={"rows": "i32", "columns": "i32", "panels": "i32", **count},
        aligned=("rows", "columns"),
        constants={
            **({} if count else {"count": 1}),  # as a launch makes a constant of any size of 1
            "passes": 1,
            "BATCH": batch,
            "HAS_BIAS": False,
            "PANEL": PANEL,
            "CHUNKS": chunks,
            "PREFETCH": config.prefetch,
        },
        warps=config.warps,
        weights=chunks * 4 * 64 * 2,
        vector_loads={"cuda": 4, "hip": 1},  # 16 values and 16 indices, 8 columns of x; half of them on warps of 64
        max_registers=96 if batch == 1 else 168,
    )


def _spmm_bitmap(warps: int, block_rows: int, batch: int) -> Variant:
    return Variant(
        kernel=spmm_bitmap_triton.spmm_bitmap_kernel,
        pointers={"x_ptr": "*bf16", **_MATRIX, "vals_ptr": "*bf16", "parts_ptr": "*fp32"},
        scalars={"rows": "i32", "columns": "i32", "groups": "i32", "groups_per_split": "i32", "count": "i32"},
        aligned=("rows", "columns"),
        constants={"HAS_ROW_BASE": False, "WIDEN": False, "BATCH": batch, "BLOCK_ROWS": block_rows},
        warps=warps,
        weights=block_rows * 128,
        vector_loads={"cuda": 8, "hip": 4},  # the words of a group for every row of the lane; the tile of x
        max_registers=184,
    )


def _unpack_bitmap() -> Variant:
    return Variant(
        kernel=unpack_bitmap_triton.unpack_bitmap_kernel,
        pointers={"dense_ptr": "*bf16", **_MATRIX, "vals_ptr": "*bf16"},
        scalars={"rows": "i32", "columns": "i32", "groups": "i32"},
        aligned=("columns",),
        constants={
            "HAS_ROW_BASE": False,
            "BLOCK_ROWS": unpack_bitmap_triton._BLOCK_ROWS,
            "BLOCK_GROUPS": unpack_bitmap_triton._BLOCK_GROUPS,
        },
        warps=unpack_bitmap_triton._WARPS,
        weights=unpack_bitmap_triton._BLOCK_ROWS * unpack_bitmap_triton._BLOCK_GROUPS * 128,
        vector_loads={"cuda": 1, "hip": 0},  # the words of a group
        max_registers=96,
    )


def _unpack_idx8() -> Variant:
    return Variant(
        kernel=unpack_idx8_triton.unpack_idx8_kernel,
        pointers={
            "dense_ptr": "*bf16",
            "start_ptr": "*i32",
            "base_ptr": "*u16",
            "index_ptr": "*u8",
            "vals_ptr": "*bf16",
        },
        scalars={"rows": "i32", "columns": "i32", "panels": "i32"},
        aligned=("columns",),
        constants={"PANEL": PANEL, "CHUNKS": unpack_idx8_triton._CHUNKS},
        warps=unpack_idx8_triton._WARPS,
        weights=unpack_idx8_triton._CHUNKS * 4 * 64 * 2,
        vector_loads={"cuda": 2, "hip": 0},  # values and indices
        max_registers=128,
    )


_PLACE = {"count": "i64", "skip": "i32", "first_block": "i64", "seed": "u64", "layer": "u32", "step": "u32"}


def _mask(
    kernel: triton.JITFunction,
    pointers: dict[str, str],
    config: mask_forward_triton.Config,
    vector_loads: dict[str, int],
    extra: dict[str, Any],
) -> Variant:
    return Variant(
        kernel=kernel,
        pointers=pointers,
        scalars={**_PLACE, "scale": "fp32", "inverse_temperature": "fp32"},
        aligned=("count", "skip"),
        constants={"NOISE": True, "FAST_MATH": True, "BLOCK": config.block, **extra},
        backend_constants={"hip": {"FAST_MATH": False}},
        warps=config.warps,
        weights=config.block,
        vector_loads=vector_loads,
        max_registers=96,
    )


def _adam8bit(dtype: str, vector_loads: dict[str, int]) -> Variant:
    numbers = ("unit", "beta1", "beta2", "rate", "root_scale", "shift")
    return Variant(
        kernel=adam8bit_triton.adam8bit_kernel,
        pointers={"logits_ptr": dtype, "grad_ptr": dtype, "moments_ptr": "*i16", "shift_ptr": "*fp64"},
        scalars={**_PLACE, **dict.fromkeys(numbers, "fp32")},
        aligned=("count", "skip"),
        constants={"SHIFT_IN_MEMORY": True, "FAST_MATH": True, "BLOCK": adam8bit_triton._BLOCK},
        backend_constants={"hip": {"FAST_MATH": False}},
        warps=4,
        weights=adam8bit_triton._BLOCK,
        vector_loads=vector_loads,
        max_registers=96,
    )


def _add_stochastic() -> Variant:
    return Variant(
        kernel=add_stochastic_triton.add_stochastic_kernel,
        pointers={"total_ptr": "*bf16", "term_ptr": "*bf16"},
        scalars={"count": "i64", "first_block": "i64", "skip": "i32", "seed": "i64", "layer": "i64", "step": "i32"},
        aligned=("count", "skip"),
        constants={"BLOCK": add_stochastic_triton._BLOCK},
        warps=4,
        weights=add_stochastic_triton._BLOCK,
        vector_loads={"cuda": 2, "hip": 0},
        max_registers=96,
    )


def _output_losses(with_teacher: bool) -> Variant:
    lanes = output_losses_triton._LANES
    return Variant(
        kernel=output_losses_triton.output_losses_kernel,
        pointers={
            "student_ptr": "*bf16",
            "teacher_ptr": "*bf16",
            "targets_ptr": "*i64",
            "losses_ptr": "*fp64",
            "log_sums_ptr": "*fp32",
        },
        scalars={"vocabulary": "i32"},
        aligned=("vocabulary",),
        constants={"HAS_TEACHER": with_teacher, "LANES": lanes},
        warps=4,
        weights=4 * lanes,
        vector_loads={"cuda": 8 if with_teacher else 4, "hip": 0},
        max_registers=168,
    )


def _output_losses_backward() -> Variant:
    return Variant(
        kernel=output_losses_triton.output_losses_backward_kernel,
        pointers={
            "student_ptr": "*bf16",
            "teacher_ptr": "*bf16",
            "targets_ptr": "*i64",
            "log_sums_ptr": "*fp32",
            "per_target": "*fp32",
            "per_row": "*fp32",
            "grad_ptr": "*bf16",
        },
        scalars={"vocabulary": "i32", "blocks": "i32"},
        aligned=("vocabulary",),
        constants={
            "PER_TARGET_IN_MEMORY": True,
            "PER_ROW_IN_MEMORY": True,
            "HAS_TEACHER": True,
            "BLOCK": output_losses_triton._BLOCK,
        },
        warps=4,
        weights=output_losses_triton._BLOCK,
        vector_loads={"cuda": 8, "hip": 0},
        max_registers=168,
    )


def _radix_counts() -> Variant:
    return Variant(
        kernel=radix_counts_triton.radix_counts_kernel,
        pointers={"values_ptr": "*fp32", "counts_ptr": "*i32"},
        scalars={"count": "i64", "upper": "i32"},
        aligned=("count",),
        constants={"HIGH": True, "COPIES": radix_counts_triton._COPIES, "BLOCK": radix_counts_triton._BLOCK},
        warps=4,
        weights=radix_counts_triton._BLOCK,
        vector_loads={"cuda": 2, "hip": 0},
        max_registers=96,
    )


VARIANTS: dict[str, Variant] = {
    "adam8bit float32": _adam8bit("*fp32", {"cuda": 5, "hip": 0}),
    "adam8bit bfloat16": _adam8bit("*bf16", {"cuda": 3, "hip": 0}),
    "add_stochastic bfloat16": _add_stochastic(),
    "output_losses": _output_losses(True),
    "output_losses without teacher": _output_losses(False),
    "output_losses_backward": _output_losses_backward(),
    "radix_counts high": _radix_counts(),
    "gemv_bitmap float32": _gemv_bitmap("*fp32", gemv_bitmap_triton.Config(4)),
    "unpack_bitmap bfloat16": _unpack_bitmap(),
    "unpack_idx8 bfloat16": _unpack_idx8(),
    "mask_forward bfloat16": _mask(
        mask_forward_triton.mask_forward_kernel,
        {"weight_ptr": "*bf16", "logits_ptr": "*fp32", "out_ptr": "*bf16", "partial_ptr": "*fp32"},
        mask_forward_triton.default_config(1 << 24),
        {"cuda": 6, "hip": 0},
        {"TILES": mask_forward_triton.default_config(1 << 24).tiles},
    ),
    "mask_backward bfloat16": _mask(
        mask_backward_triton.mask_backward_kernel,
        {
            "grad_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "logits_ptr": "*fp32",
            "out_ptr": "*fp32",
            "stats_grad_ptr": "*fp64",
        },
        mask_forward_triton.Config(mask_backward_triton._BLOCK, 1, 4),
        {"cuda": 8, "hip": 2},
        {},
    ),
}
for _warps in (2, 4, 8):  # those that the heuristics choose
    VARIANTS[f"gemv_bitmap bfloat16 {_warps} warps"] = _gemv_bitmap("*bf16", gemv_bitmap_triton.Config(_warps))
for _warps in (8, 16):
    VARIANTS[f"gemv_idx8 x1 {_warps} warps"] = _gemv_idx8(gemv_idx8_triton.Config(_warps), 1)
VARIANTS["gemv_idx8 x4 16 warps"] = _gemv_idx8(gemv_idx8_triton.Config(16), 4)
VARIANTS["spmm_bitmap x16 2 warps"] = _spmm_bitmap(2, 32, 16)
