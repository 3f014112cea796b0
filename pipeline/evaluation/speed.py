"""What is measured of the speed of a pruned model."""

from __future__ import annotations

from typing import TypedDict


class MatrixSpeed(TypedDict, total=False):
    """Products with one matrix of a pruned model, packed and dense, one row of x."""

    shape: list[int]
    """[out, in]"""
    layers: int
    """How many pruned layers have this shape."""
    layer: str
    """The one that was measured."""
    sparsity: float
    dtype: str
    dense_us: float
    sparse_us: float
    """Microseconds of a call."""
    speedup: float
    byte_limit: float
    """The speed-up that the bytes of the two forms allow."""
    bandwidth: float
    """Of a plain read's, as a fraction."""


class TokenTime(TypedDict, total=False):
    """Batch-1 decoding with one model."""

    tokens_per_second: float
    token_ms: float
    """Median milliseconds of a token; the three parts below add up to it."""
    linears_ms: float
    """The pruned layers."""
    head_ms: float
    rest_ms: float
    peak_bytes: int
    """On a GPU."""


class DecodeSpeed(TypedDict, total=False):
    """Decoding in one number type, dense and sparse in turn in one process."""

    dense: TokenTime
    sparse: TokenTime
    speedup: float
    speedup_low: float
    speedup_high: float
    speedup_without_head: float


class Speed(TypedDict, total=False):
    """How fast a variant is with its own masks."""

    machine: str
    matrices: list[MatrixSpeed]
    decode: dict[str, DecodeSpeed]
    """By number type."""
