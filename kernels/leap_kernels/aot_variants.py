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
)


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


_BITMAP = {"bits_ptr": "*i32", "off_ptr": "*i32", "row_base_ptr": "*i64"}


def _gemv_bitmap(dtype: str) -> Variant:
    rows, groups = gemv_bitmap_triton._BLOCK_ROWS, gemv_bitmap_triton._BLOCK_GROUPS
    return Variant(
        kernel=gemv_bitmap_triton.gemv_bitmap_kernel,
        pointers={**_BITMAP, "vals_ptr": dtype, "x_ptr": "*fp32", "y_ptr": dtype},
        scalars={"rows": "i32", "groups": "i32", "x_columns": "i32"},
        aligned=("x_columns",),
        constants={"HAS_ROW_BASE": False, "BLOCK_ROWS": rows, "BLOCK_GROUPS": groups},
        warps=gemv_bitmap_triton._WARPS,
        weights=rows * groups * 128,
        vector_loads={"cuda": 6, "hip": 3},  # the words of a group for every row of the lane, and 8 columns of x
        max_registers=96,
    )


def _gemv_idx8(config: triton.Config, batch: int) -> Variant:
    chunks = config.kwargs["CHUNKS"]
    return Variant(
        kernel=gemv_idx8_triton.gemv_idx8_kernel.fn,
        pointers={
            "start_ptr": "*i32",
            "base_ptr": "*i16",
            "index_ptr": "*u8",
            "vals_ptr": "*bf16",
            "x_ptr": "*fp32",
            "y_ptr": "*bf16",
        },
        scalars={"rows": "i32", "x_stride": "i32"},
        aligned=("rows", "x_stride"),
        constants={"BATCH": batch, "CHUNKS": chunks},
        warps=config.num_warps,
        weights=chunks * 4 * 64 * 2,
        vector_loads={"cuda": 3, "hip": 1},  # 16 values and 16 indices; half of them on warps of 64
        max_registers=96 if batch == 1 else 168,
    )


def _spmm_bitmap(config: triton.Config, batch: int) -> Variant:
    rows = config.kwargs["BLOCK_ROWS"]
    return Variant(
        kernel=spmm_bitmap_triton.spmm_bitmap_kernel.fn,
        pointers={**_BITMAP, "vals_ptr": "*bf16", "x_ptr": "*bf16", "parts_ptr": "*fp32"},
        scalars={"rows": "i32", "groups": "i32", "groups_per_split": "i32"},
        aligned=("rows",),
        constants={"HAS_ROW_BASE": False, "WIDEN": False, "BATCH": batch, "BLOCK_ROWS": rows},
        warps=config.num_warps,
        weights=rows * 128,
        vector_loads={"cuda": 8, "hip": 4},  # the words of a group for every row of the lane; the tile of x
        max_registers=168,
    )


def _unpack_bitmap() -> Variant:
    return Variant(
        kernel=unpack_bitmap_triton.unpack_bitmap_kernel,
        pointers={**_BITMAP, "vals_ptr": "*bf16", "dense_ptr": "*bf16"},
        scalars={"rows": "i32", "columns": "i32", "groups": "i32"},
        aligned=("columns",),
        constants={"HAS_ROW_BASE": False, "BLOCK_ROWS": unpack_bitmap_triton._BLOCK_ROWS},
        warps=unpack_bitmap_triton._WARPS,
        weights=unpack_bitmap_triton._BLOCK_ROWS * 128,
        vector_loads={"cuda": 1, "hip": 0},  # the words of a group
        max_registers=96,
    )


def _mask(kernel: triton.JITFunction, pointers: dict[str, str], block: int, vector_loads: dict[str, int]) -> Variant:
    scalars = {"count": "i64", "first_block": "i64", "skip": "i32", "seed": "i64", "layer": "i32", "step": "i32"}
    return Variant(
        kernel=kernel,
        pointers=pointers,
        scalars={**scalars, "scale": "fp32", "inverse_temperature": "fp32"},
        aligned=("count", "skip"),
        constants={"NOISE": True, "FAST_MATH": True, "BLOCK": block},
        backend_constants={"hip": {"FAST_MATH": False}},
        warps=4,
        weights=block,
        vector_loads=vector_loads,
        max_registers=96,
    )


_STREAM = {"count": "i64", "first_block": "i64", "skip": "i32", "seed": "i64", "layer": "i64", "step": "i32"}


def _adam8bit(dtype: str, vector_loads: dict[str, int]) -> Variant:
    numbers = ("unit", "beta1", "beta2", "rate", "root_scale")
    return Variant(
        kernel=adam8bit_triton.adam8bit_kernel,
        pointers={"logits_ptr": dtype, "grad_ptr": dtype, "moments_ptr": "*i16"},
        scalars={**_STREAM, **dict.fromkeys(numbers, "fp32"), "shift": "*fp64"},
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
        scalars=_STREAM,
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
        pointers={"values_ptr": "*fp32", "counts_ptr": "*i64"},
        scalars={"count": "i64", "upper": "i32"},
        aligned=("count",),
        constants={"HIGH": True, "BLOCK": radix_counts_triton._BLOCK},
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
    "gemv_bitmap bfloat16": _gemv_bitmap("*bf16"),
    "gemv_bitmap float32": _gemv_bitmap("*fp32"),
    "unpack_bitmap bfloat16": _unpack_bitmap(),
    "mask_forward bfloat16": _mask(
        mask_forward_triton.mask_forward_kernel,
        {"weight_ptr": "*bf16", "logits_ptr": "*fp32", "out_ptr": "*bf16", "partial_ptr": "*fp32"},
        mask_forward_triton._BLOCK,
        {"cuda": 6, "hip": 2},
    ),
    "mask_backward bfloat16": _mask(
        mask_backward_triton.mask_backward_kernel,
        {
            "grad_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "logits_ptr": "*fp32",
            "stats_grad_ptr": "*fp32",
            "out_ptr": "*fp32",
        },
        mask_backward_triton._BLOCK,
        {"cuda": 8, "hip": 2},
    ),
}
for _config in gemv_idx8_triton.CONFIGS:
    VARIANTS[f"gemv_idx8 x1 {_config.num_warps} warps"] = _gemv_idx8(_config, 1)
VARIANTS["gemv_idx8 x4 1 warps"] = _gemv_idx8(gemv_idx8_triton.CONFIGS[0], 4)
for _config in spmm_bitmap_triton.CONFIGS:
    VARIANTS[f"spmm_bitmap x16 {_config.num_warps} warps"] = _spmm_bitmap(_config, 16)
